#!/bin/sh
# Two workers on one machine, and a long job that counts and prints checksums. The owner of the first worker's host comes
# back: the job stands still at once, is written down, and goes on with the second worker. Its log is whole.
#
#     resources/two-workers.sh            # takes half a minute; needs 'harrier' on the path, or HARRIER=FILE
#     STEPS=1000 resources/two-workers.sh # a longer job
set -eu

harrier=${HARRIER:-harrier}
steps=${STEPS:-200}
dir=$(mktemp -d)
export HARRIER_QUEUE="$dir/queue"
workers=

end() {
    for worker in $workers; do kill "$worker" 2>/dev/null || true; done
    wait
    rm -rf "$dir"
}
trap end EXIT
trap 'exit 1' INT TERM

# Every line depends on all lines before it.
count='s=0; i=0
while [ $i -lt '$steps' ]; do
    i=$((i+1)); s=$(echo "$s $i" | sha256sum | cut -c1-16); echo "$i $s"; usleep 50000
done'

# An owner who is not patient: jobs leave the host after it was wanted for two seconds.
echo 'evict = "suspended_for > 2s"' > "$dir/policy.toml"

"$harrier" worker --name first --state "$dir/first" --policy "$dir/policy.toml" &
workers="$workers $!"
job=$("$harrier" submit --name count --memory 128M -- sh -c "$count")
until [ "$("$harrier" logs "$job" | wc -l)" -ge 20 ]; do sleep 0.1; done

"$harrier" worker --name second --state "$dir/second" &
workers="$workers $!"
"$harrier" worker busy --state "$dir/first"
"$harrier" wait "$job"

"$harrier" status "$job"
"$harrier" logs "$job" > "$dir/log"
sh -c "$(echo "$count" | sed 's/usleep 50000/:/')" > "$dir/expected"
cmp "$dir/log" "$dir/expected"
[ "$("$harrier" status --json "$job" | grep -c '"host": "second"')" -ge 1 ]
echo "job $job has moved, and its log of $(wc -l < "$dir/log") lines is whole"
