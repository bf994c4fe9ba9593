//! Programs of a Debian root in a guest: Python's own test modules, a C compiler and what it makes, openssl, perl, threads
//! on two processors. Every entry judges itself and is a machine of its own.

use std::process::{Command, Stdio};

use super::report::{Row, Table, Verdict};
use super::{Debian, EngineName, SuiteError};

/// What the programs run in.
#[derive(Debug, Clone, clap::Args)]
pub struct Guest {
    /// A Debian with python3 and its tests, gcc, openssl and perl
    #[command(flatten)]
    pub debian: Debian,
    /// Run only entries whose name contains this
    #[arg(long, value_name = "NAME")]
    pub only: Option<String>,
}

/// An entry: its name, the processors it wants, and what a shell does for it.
struct Entry {
    name: String,
    cpus: u32,
    script: String,
}

/// How long an entry may take: the longest modules need minutes in software.
const PATIENCE: &str = "30m";

/// Python's test modules for arithmetic, struct, compression, hashing and what lies on them.
const PYTHON: &[&str] = &[
    "test_array",
    "test_audioop",
    "test_binascii",
    "test_bz2",
    "test_cmath",
    "test_complex",
    "test_decimal",
    "test_float",
    "test_fractions",
    "test_hashlib",
    "test_hmac",
    "test_int",
    "test_long",
    "test_lzma",
    "test_math",
    "test_numeric_tower",
    "test_pow",
    "test_random",
    "test_statistics",
    "test_strtod",
    "test_struct",
    "test_threading",
    "test_zlib",
];

/// Integers, floating point and strings, the same under every optimisation: it prints a sum of all that it made.
const C_PROGRAM: &str = r#"
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static uint64_t sum = 14695981039346656037u;
static void add(const void *at, size_t n) {
    const unsigned char *p = at;
    while (n--) sum = (sum ^ *p++) * 1099511628211u;
}
static int order(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}
int main(void) {
    static uint32_t v[50000];
    uint32_t x = 2463534242u;
    for (int i = 0; i < 50000; i++) {
        x ^= x << 13; x ^= x >> 17; x ^= x << 5;
        v[i] = x;
    }
    qsort(v, 50000, 4, order);
    for (int i = 1; i < 50000; i++) if (v[i - 1] > v[i]) return 1;
    add(v, sizeof v);
    static float a[64][64], b[64][64], c[64][64];
    for (int i = 0; i < 64; i++) for (int j = 0; j < 64; j++) {
        a[i][j] = (float)((i * 7 + j) % 11); b[i][j] = (float)((i + j * 5) % 13);
    }
    for (int i = 0; i < 64; i++) for (int j = 0; j < 64; j++) for (int k = 0; k < 64; k++)
        c[i][j] += a[i][k] * b[k][j];
    add(c, sizeof c);
    double d = 0;
    for (int i = 1; i < 20000; i++) d += sqrt((double)i) / (i + 0.5) - floor(i / 3.0) * ldexp(1.0, -20);
    add(&d, sizeof d);
    for (int64_t i = -3000; i < 3000; i++) {
        int64_t q = 1234567890123456789 / (i | 1), r = 1234567890123456789 % (i | 1);
        add(&q, 8); add(&r, 8);
        int clz = __builtin_clzll(v[i + 3000] | 1), pop = __builtin_popcountll(v[i + 3000]);
        add(&clz, 4); add(&pop, 4);
    }
    char text[4096];
    for (int i = 0; i < 500; i++) {
        snprintf(text, sizeof text, "%d %x %.17g %s", i * i, v[i], v[i] / 7.0, strchr("harrier", 'r'));
        add(text, strlen(text));
    }
    printf("%016llx\n", (unsigned long long)sum);
    return 0;
}
"#;

/// A counter without a lock, one behind a mutex, and two threads that take turns.
const THREADS: &str = r#"
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#define ROUNDS 200000
static atomic_long free_count;
static long locked_count;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int turn, turns;
static void *count(void *unused) {
    for (int i = 0; i < ROUNDS; i++) {
        atomic_fetch_add(&free_count, 1);
        pthread_mutex_lock(&mutex); locked_count++; pthread_mutex_unlock(&mutex);
    }
    return unused;
}
static void *take_turns(void *me) {
    for (int i = 0; i < 2000; i++) {
        pthread_mutex_lock(&mutex);
        while (turn != (long)me) pthread_cond_wait(&changed, &mutex);
        turn = !turn; turns++;
        pthread_cond_signal(&changed);
        pthread_mutex_unlock(&mutex);
    }
    return me;
}
int main(void) {
    pthread_t t[4];
    for (int i = 0; i < 4; i++) pthread_create(&t[i], 0, count, 0);
    for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
    for (long i = 0; i < 2; i++) pthread_create(&t[i], 0, take_turns, (void *)i);
    for (int i = 0; i < 2; i++) pthread_join(t[i], 0);
    printf("%ld %ld %d\n", (long)free_count, locked_count, turns);
    return !(free_count == 4 * ROUNDS && locked_count == 4 * ROUNDS && turns == 4000);
}
"#;

/// Signs, verifies, encrypts and decrypts; its hashes of "abc" are those of FIPS 180-4, appendix.
const OPENSSL: &str = r#"
set -e
[ "$(printf abc | openssl dgst -sha256 -r | cut -d' ' -f1)" = ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad ]
[ "$(printf abc | openssl dgst -sha1 -r | cut -d' ' -f1)" = a9993e364706816aba3e25717850c26c9cd0d89d ]
head -c 300000 /dev/urandom > plain
for cipher in aes-128-cbc aes-256-ctr chacha20 camellia-256-cbc; do
    openssl enc -$cipher -pbkdf2 -pass pass:x -in plain -out secret
    openssl enc -d -$cipher -pbkdf2 -pass pass:x -in secret | cmp - plain
done
for kind in "RSA -pkeyopt rsa_keygen_bits:2048" "EC -pkeyopt ec_paramgen_curve:P-256" "EC -pkeyopt ec_paramgen_curve:P-521"; do
    openssl genpkey -quiet -algorithm $kind -out key
    openssl pkey -in key -pubout -out public
    openssl dgst -sha512 -sign key -out signature plain
    openssl dgst -sha512 -verify public -signature signature plain
done
openssl prime -checks 20 170141183460469231731687303715884105727 | grep -q 'is prime'
"#;

const PERL: &str = r#"
use strict; use warnings; use Digest::SHA qw(sha256_hex); use Digest::MD5 qw(md5_hex); use List::Util qw(sum); use POSIX ();
use Math::BigInt; use MIME::Base64; use Compress::Zlib;
sub is { my ($got, $want) = @_; die "$got is not $want\n" unless $got eq $want }
is(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
is(md5_hex(""), "d41d8cd98f00b204e9800998ecf8427e");
is(Math::BigInt->new(2)->bpow(200)->bstr, "1606938044258990275541962092341162602522202993782792835301376");
is(length(Math::BigInt->new(100)->bfac->bstr), 158);
my @numbers = map { ($_ * 7919) % 100003 } 1 .. 100000;
my @sorted = sort { $a <=> $b } @numbers;
is(sum(@sorted), sum(@numbers));
for (1 .. $#sorted) { die "unsorted\n" if $sorted[$_ - 1] > $sorted[$_] }
my $text = join " ", @numbers;
is(scalar(() = $text =~ /\b(\d)\d*\1\b/g), scalar(grep { /^(\d)\d*\1$/ } @numbers));
is(decode_base64(encode_base64($text)), $text);
is(Compress::Zlib::memGunzip(Compress::Zlib::memGzip($text)), $text);
is(sprintf("%.15g %e %x", POSIX::atan(1) * 4, 1 / 3, 255), "3.14159265358979 3.333333e-01 ff");
"#;

fn entries() -> Vec<Entry> {
    let entry = |name: &str, cpus, script: String| Entry { name: name.to_owned(), cpus, script };
    let python = PYTHON.iter().map(|module| entry(module, 1, format!("python3 -m test -q {module}")));
    // Without contraction: FMA rounds once where others round twice.
    let flags = ["-O0", "-O2", "-O3 -march=x86-64-v2", "-O2 -flto", "-Os -fsanitize=undefined"];
    let builds: String = flags
        .iter()
        .map(|flags| {
            format!("gcc -ffp-contract=off {flags} one.c -o one -lm; s=$(./one); echo \"$s {flags}\"; [ \"$s\" = \"${{first:=$s}}\" ]\n")
        })
        .collect();
    let rest = [
        entry("gcc", 1, format!("set -e\ncat > one.c <<'end of c'\n{C_PROGRAM}\nend of c\n{builds}")),
        entry(
            "threads",
            2,
            format!(
                "set -e\ncat > two.c <<'end of c'\n{THREADS}\nend of c\ngcc -O2 -pthread two.c -o two; ./two; ./two"
            ),
        ),
        entry("openssl", 1, OPENSSL.to_owned()),
        entry(
            "openssl-speed",
            1,
            "openssl speed -seconds 1 -bytes 4096 sha256 sha512 aes-128-cbc 2>&1 && \
             openssl speed -seconds 1 -bytes 4096 -evp aes-256-gcm 2>&1 && \
             openssl speed -seconds 1 rsa2048 ecdsap256 2>&1"
                .to_owned(),
        ),
        entry("perl", 1, format!("cat > one.pl <<'end of perl'\n{PERL}\nend of perl\nperl one.pl")),
    ];
    python.chain(rest).collect()
}

/// Runs the programs in guests on `engine`.
///
/// # Errors
/// [`SuiteError`] if `harrier` cannot be run at all, or nothing has that name.
pub fn run(engine: EngineName, guest: &Guest) -> Result<Table, SuiteError> {
    let engine = engine.word();
    let mut entries = entries();
    if let Some(part) = &guest.only {
        entries.retain(|entry| entry.name.contains(part.as_str()));
        if entries.is_empty() {
            return Err(SuiteError::NoEntry(part.clone()));
        }
    }
    let mut table = Table::new(vec![engine.to_owned()]);
    for entry in entries {
        let output = Command::new(&guest.debian.harrier)
            .args(["run", "--quiet", "--engine", engine, "--memory", "1500M", "--timeout", PATIENCE])
            .args(["--cpus", &entry.cpus.to_string(), "--workdir", "/tmp", "--rootfs"])
            .arg(&guest.debian.rootfs)
            .args(["--", "sh", "-c", &entry.script])
            .stdin(Stdio::null())
            .output()
            .map_err(|source| SuiteError::Program { program: "harrier", source })?;
        let said = [output.stdout, output.stderr].concat();
        let verdict = judge(output.status.code(), &String::from_utf8_lossy(&said));
        table.rows.push(Row { name: entry.name, verdicts: vec![verdict] });
    }
    Ok(table)
}

/// What an exit code and the last words mean.
fn judge(code: Option<i32>, said: &str) -> Verdict {
    let last = |lines: usize| {
        let lines: Vec<&str> =
            said.lines().map(str::trim).filter(|line| !line.is_empty()).rev().take(lines).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    };
    match code {
        Some(0) => Verdict::Pass,
        Some(124) => Verdict::fail(format!("no end in {PATIENCE}")),
        Some(code) => Verdict::fail(format!("exit code {code}: {}", last(4))),
        None => Verdict::fail("harrier was killed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_its_last_words() {
        assert_eq!(judge(Some(0), "all well"), Verdict::Pass);
        assert_eq!(judge(Some(2), "a\n\nb\n c \nd\ne\n"), Verdict::fail("exit code 2: b | c | d | e"));
        assert_eq!(judge(Some(124), ""), Verdict::fail("no end in 30m"));
    }

    #[test]
    fn no_two_entries_have_one_name() {
        let names: std::collections::BTreeSet<_> = entries().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), entries().len());
    }
}
