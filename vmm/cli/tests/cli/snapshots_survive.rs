//! Snapshots, restores and forks under whatever may happen to them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::machines::{Machines, eventually, kill_process};
use crate::snapshots::{kvm_is_there, lines, text, wait_for_line};
use crate::support::{Code, KernelFile};

/// Every step of a chain of checksums is printed; each takes four processes.
const CHAIN: &str = "s=0; i=0; while [ $i -lt 150 ]; do s=$(echo $s $i | md5sum | cut -c1-8); i=$((i+1)); \
                     echo step $i $s; usleep 20000; done; exit 5";

/// What it prints.
fn expected_chain() -> Vec<String> {
    let script = CHAIN.replace("usleep 20000", ":");
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn ten_times_paused_kept_and_restored_a_job_loses_and_doubles_nothing() {
    let machines = Machines::new();
    let kept = tempfile::tempdir().unwrap();
    let engines: &[&str] = if kvm_is_there(&machines) { &["soft", "kvm"] } else { &["soft"] };
    let run =
        ["run", "-d", "--name", "leg-0", "--memory", "128M", "--cpu-model", "v1", "--engine", engines[0]];
    machines.good(&[&run[..], &["--", "sh", "-c", CHAIN]].concat());
    let mut said = String::new();
    for leg in 0..10 {
        let (name, next) = (format!("leg-{leg}"), format!("leg-{}", leg + 1));
        let step = |log: &str| lines(log, "step").len();
        eventually("some steps", || step(&machines.good(&["logs", &name])) >= 3);
        machines.good(&["pause", &name]);
        let target = kept.path().join(&next);
        machines.good(&["snapshot", &name, "--to", text(&target)]);
        said += &machines.good(&["logs", &name]);
        machines.good(&["kill", &name]);
        let engine = engines[(leg + 1) % engines.len()];
        machines.good(&["restore", text(&target), "-d", "--name", &next, "--engine", engine]);
    }
    assert_eq!(machines.run(&["wait", "leg-10"]).1.trim(), "5");
    said += &machines.good(&["logs", "leg-10"]);
    assert_eq!(said.lines().collect::<Vec<_>>(), expected_chain());
}

#[test]
fn one_snapshot_is_restored_a_hundred_times() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().print("up\n").echo_line().exit(7, 0, ""));
    machines.good(&["run", "-d", "--name", "base", "--memory", "32M", "--kernel", &kernel.path]);
    wait_for_line(&machines, "base", "up");
    machines.good(&["snapshot", "base", "--to", &machines.snapshot("kept")]);
    for round in 0..100 {
        let mut restore = machines.command(&["restore", &machines.snapshot("kept"), "--engine", "soft"]);
        let mut child =
            restore.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let line = format!("line {round}\n");
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), line.as_bytes()).unwrap();
        let output = crate::support::wait(child);
        let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        assert_eq!((output.status.code(), said.as_str()), (Some(7), line.as_str()), "round {round}");
    }
    assert!(machines.good(&["snapshots", "verify", &machines.snapshot("kept")]).contains("whole"));
}

/// It runs, or it has ended because nobody heard that it runs.
fn is_settled(state: &str) -> bool {
    matches!(state, "running" | "exited")
}

/// Kills a command after longer and longer times, from before its first step until it is through, and looks at what is
/// left each time.
fn killed_at_every_moment(machines: &Machines, arguments: &[&str], looks: impl Fn(usize)) {
    for moment in 0..40u64 {
        let mut child = machines.command(arguments).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(moment * moment * 100));
        let _ = child.kill();
        let _ = child.wait();
        looks(moment as usize);
    }
}

#[test]
fn a_restore_that_is_killed_at_any_moment_leaves_a_machine_or_none() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().print("up\n").spin());
    machines.good(&["run", "-d", "--name", "base", "--memory", "32M", "--kernel", &kernel.path]);
    let kept = machines.snapshot("kept");
    machines.good(&["snapshot", "base", "--to", &kept]);
    // The command itself is the machine.
    killed_at_every_moment(&machines, &["restore", &kept, "--name", "again"], |moment| {
        let left: Vec<_> = machines.states().into_iter().map(|(name, _)| name).collect();
        assert_eq!(left, ["base"], "moment {moment}");
    });
    // The command only starts it.
    killed_at_every_moment(&machines, &["restore", &kept, "--name", "again", "-d"], |moment| {
        eventually("it is there as a whole or not at all", || {
            let states = machines.states();
            let again = states.iter().find(|(name, _)| name == "again");
            again.is_none_or(|(_, state)| is_settled(state))
        });
        if machines.states().len() > 1 {
            assert_eq!(machines.run(&["rm", "-f", "again"]).0, 0, "moment {moment}");
        }
    });
    assert!(machines.good(&["snapshots", "verify", &kept]).contains("whole"));
    assert_eq!(machines.inspect("base")["state"], "running");
}

#[test]
fn a_fork_that_is_killed_at_any_moment_leaves_whole_clones_and_no_image() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().print("up\n").spin());
    machines.good(&["run", "-d", "--name", "base", "--memory", "32M", "--kernel", &kernel.path]);
    let images = || std::fs::read_dir(Path::new(&machines.root()).join("images")).map_or(0, Iterator::count);
    killed_at_every_moment(&machines, &["fork", "base", "-n", "2", "--name", "kid"], |moment| {
        eventually("clones are there as a whole or not at all", || {
            machines.states().iter().all(|(_, state)| is_settled(state))
        });
        for (name, _) in machines.states().iter().filter(|(name, _)| name != "base") {
            // One that was never announced may end by itself meanwhile.
            machines.run(&["rm", "-f", name]);
        }
        eventually(&format!("nothing is left, moment {moment}"), || {
            machines.states().len() == 1 && images() == 0
        });
    });
    // The monitor of the machine itself goes while it makes the image.
    for moment in [0, 1, 3, 10u64] {
        let name = format!("source-{moment}");
        machines.good(&["run", "-d", "--name", &name, "--memory", "32M", "--kernel", &kernel.path]);
        let pid = machines.inspect(&name)["pid"].as_u64().unwrap();
        let fork = machines.spawn(&["fork", &name, "--name", "orphan"]);
        std::thread::sleep(Duration::from_millis(moment));
        kill_process(pid, "KILL");
        let forked = crate::support::wait(fork);
        if !forked.status.success() {
            assert!(machines.states().iter().all(|(name, _)| name != "orphan"));
        } else {
            assert_eq!(machines.inspect("orphan")["state"], "running");
            machines.good(&["rm", "-f", "orphan"]);
        }
        machines.run(&["rm", "-f", &name]);
        eventually("no image is left", || {
            machines.states();
            images() == 0
        });
    }
    assert_eq!(machines.inspect("base")["state"], "running");
}

#[test]
fn a_guest_takes_snapshots_of_itself_and_learns_as_whom_it_returns() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().print("begun\n").checkpoint_and_exit_as_role());
    let run = ["run", "-d", "--memory", "32M", "--kernel", &kernel.path, "--name"];
    machines.good(&[&run[..], &["self"]].concat());
    assert_eq!(machines.run(&["wait", "self"]).1.trim(), "20");
    let listed: Value = serde_json::from_str(&machines.good(&["snapshots", "ls", "--json"])).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let path = listed[0]["path"].as_str().unwrap().to_owned();
    assert!(path.contains("/self-checkpoint-"), "{path}");
    for engine in ["soft", "auto"] {
        assert_eq!(machines.run(&["restore", &path, "--engine", engine]).0, 21);
    }
    machines.good(&["fork", &path, "-n", "2", "--name", "kid"]);
    for kid in ["kid-0", "kid-1"] {
        assert_eq!(machines.run(&["wait", kid]).1.trim(), "22");
    }
    // Where none are wanted, the call is refused and nothing is kept.
    machines.good(&[&run[..], &["none", "--checkpoints", "0"]].concat());
    assert_eq!(machines.run(&["wait", "none"]).1.trim(), "20");
    let listed: Value = serde_json::from_str(&machines.good(&["snapshots", "ls", "--json"])).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let refused = machines.bad(&["run", "--checkpoints", "-1", "--", "true"]);
    assert!(refused.contains("--checkpoints '-1' is not possible"), "{refused}");
}

#[test]
fn a_host_without_room_says_so_and_the_machine_goes_on() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().print("up\n").spin());
    let harrier = env!("CARGO_BIN_EXE_harrier");
    // A quota: guest memory fits it, and a snapshot's memory with what stands behind it does not.
    let script =
        format!("ulimit -f 32768; exec {harrier} run -d --name small --memory 32M --kernel {}", kernel.path);
    let mut shell = Command::new("bash");
    shell.args(["-c", &script]).env("HARRIER_RUNTIME_DIR", machines.root());
    let started = shell.output().unwrap();
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    let kept = tempfile::tempdir().unwrap();
    let said = machines.bad(&["snapshot", "small", "--to", text(&kept.path().join("s"))]);
    assert!(said.contains("File too large"), "{said}");
    assert_eq!(std::fs::read_dir(kept.path()).unwrap().count(), 0, "nothing is left behind");
    let said = machines.bad(&["fork", "small"]);
    assert!(said.contains("File too large"), "{said}");
    assert_eq!(machines.inspect("small")["state"], "running");
    machines.good(&["pause", "small"]);

    // A full disk, and one that is read-only.
    let script = format!(
        "mount -t tmpfs -o size=2m none /mnt || exit 77; run() {{ echo; {harrier} \"$@\" 2>&1; }}; \
         export HARRIER_RUNTIME_DIR={root}-full; \
         run run -d --name base --memory 32M --kernel {kernel}; head -c 2200000 /dev/zero > /mnt/fill; \
         run snapshot base --to /mnt/s; echo left $(ls -A /mnt); \
         mount -o remount,ro /mnt; run snapshot base --to /mnt/s; run fork base --name kid; \
         echo kid $({harrier} inspect kid | grep -c running); run rm -f base kid",
        root = machines.root(),
        kernel = kernel.path,
    );
    let output = Command::new("unshare").args(["-rm", "bash", "-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() && !said.contains("left") {
        eprintln!("skipped: no mount namespace here: {}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    assert!(said.contains("No space left on device") && said.contains("left fill\n"), "{said}");
    assert!(said.contains("Read-only file system") && said.contains("kid 1"), "{said}");
}

/// Seconds of guest time that a sleep of three took, and the guest's wall clock at its end.
fn times(said: &str) -> (f64, i64) {
    let line = said.lines().find_map(|line| line.strip_prefix("times ")).unwrap_or_else(|| panic!("{said}"));
    let numbers: Vec<f64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    (numbers[1] - numbers[0], numbers[2] as i64)
}

#[test]
fn guest_time_stands_with_the_machine_and_the_wall_clock_is_right_afterwards() {
    const STANDS: Duration = Duration::from_secs(5);
    let machines = Machines::new();
    let script = "read a x < /proc/uptime; echo begun; sleep 3; read b x < /proc/uptime; sleep 0.5; \
                  echo times $a $b $(date +%s)";
    machines.good(&["run", "-d", "--name", "sleeper", "--memory", "128M", "--", "sh", "-c", script]);
    wait_for_line(&machines, "sleeper", "begun");
    let kept = machines.snapshot("kept");
    machines.good(&["snapshot", "sleeper", "--to", &kept]);
    std::thread::sleep(STANDS);
    let now = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        i64::try_from(since.as_secs()).unwrap()
    };
    let check = |said: &str, how: &str| {
        let (slept, wall) = times(said);
        // A sleeper sleeps for what was left to it, as after a pause: the time in between does not count.
        assert!((2.9..7.5).contains(&slept), "{how}: a sleep of 3 s took {slept} s");
        assert!((now() - wall).abs() <= 3, "{how}: the wall clock is {} s off", now() - wall);
    };
    let engines: &[&str] = if kvm_is_there(&machines) { &["soft", "kvm"] } else { &["soft"] };
    for engine in engines {
        let restore = ["restore", &kept, "--engine", engine, "--timeout", "60s"];
        let (code, said, err) = machines.run(&restore);
        assert_eq!(code, 0, "{engine}: {err}");
        check(&said, engine);
        // On a host whose clocks have jumped ahead by a day, or where the host was started anew.
        let mut jumped = Command::new("unshare");
        jumped.args([
            "-rT",
            "--fork",
            "--monotonic",
            "86400",
            "--boottime",
            "86400",
            env!("CARGO_BIN_EXE_harrier"),
        ]);
        let output = jumped.args(restore).env("HARRIER_RUNTIME_DIR", machines.root()).output().unwrap();
        if !output.status.success() && output.stdout.is_empty() {
            eprintln!("skipped: no time namespace here: {}", String::from_utf8_lossy(&output.stderr));
            continue;
        }
        check(&String::from_utf8_lossy(&output.stdout), &format!("{engine}, a day later"));
    }
}
