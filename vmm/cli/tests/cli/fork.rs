//! Clones of machines, as a user makes them.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::machines::{Machines, eventually, kill_process};
use crate::support::{Code, KernelFile};

fn images(machines: &Machines) -> usize {
    std::fs::read_dir(Path::new(&machines.root()).join("images")).map_or(0, Iterator::count)
}

fn pid(machines: &Machines, name: &str) -> u64 {
    machines.inspect(name)["pid"].as_u64().unwrap()
}

#[test]
fn clones_go_on_beside_the_machine_each_as_somebody_else() {
    let machines = Machines::new();
    // Every clone says who it is, with a number of its kernel's, and ends with its own code.
    let script = "for i in $(seq 40); do echo step $i; usleep 50000; done; f=/run/harrier/identity; \
                  [ -e $f ] || exit 99; . $f; echo I $HARRIER_ROLE $HARRIER_GENERATION $HARRIER_CLONE_INDEX \
                  $(cat /proc/sys/kernel/random/uuid); echo reseeded $(dmesg | grep -c 'virtual machine fork'); \
                  exit $((10 + HARRIER_CLONE_INDEX))";
    let run =
        ["run", "-d", "--name", "base", "--memory", "128M", "--cpu-model", "v1", "--", "sh", "-c", script];
    machines.good(&run);
    eventually("it works", || machines.good(&["logs", "base"]).contains("step 3\n"));
    let forked: Value =
        serde_json::from_str(&machines.good(&["fork", "base", "-n", "3", "--name", "kid", "--json"]))
            .unwrap();
    assert!(forked["pause_us"].as_u64().unwrap() > 0, "{forked}");
    let names: Vec<&str> =
        forked["clones"].as_array().unwrap().iter().map(|clone| clone["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["kid-0", "kid-1", "kid-2"]);
    assert_eq!(images(&machines), 1);
    // A clone of a clone has one restore more behind it.
    let id = machines.good(&["fork", "kid-1", "--name", "grandkid"]);
    assert_eq!(machines.inspect("grandkid")["id"].as_str(), Some(id.trim()));
    assert_eq!(machines.inspect("grandkid")["command"][2].as_str(), Some(script));
    let mut numbers = BTreeSet::new();
    for (name, who, code) in [
        ("kid-0", "I clone 1 0 ", "10"),
        ("kid-1", "I clone 1 1 ", "11"),
        ("kid-2", "I clone 1 2 ", "12"),
        ("grandkid", "I clone 2 0 ", "10"),
        ("base", "", "99"),
    ] {
        assert_eq!(machines.run(&["wait", name]).1.trim(), code, "{name}");
        let said = machines.good(&["logs", name]);
        let steps: Vec<&str> = said.lines().filter(|line| line.starts_with("step ")).collect();
        let expected: Vec<String> = (41 - steps.len()..=40).map(|step| format!("step {step}")).collect();
        assert_eq!(steps, expected, "{name}");
        if let Some(line) = said.lines().find(|line| line.starts_with("I ")) {
            let number = line.strip_prefix(who).unwrap_or_else(|| panic!("{name}: {line}"));
            assert!(numbers.insert(number.to_owned()), "{name} has the random number of another one");
            // Each restore tells the kernel once.
            let told = who.split_whitespace().nth(2).unwrap();
            assert!(said.contains(&format!("reseeded {told}\n")), "{name}: {said}");
        }
    }
    assert_eq!(numbers.len(), 4);
    eventually("no image is left", || images(&machines) == 0);
}

#[test]
fn an_image_goes_with_its_last_clone_however_that_ends() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().print("up\n").spin());
    machines.good(&["run", "-d", "--name", "base", "--memory", "32M", "--kernel", &kernel.path]);
    machines.good(&["fork", "base", "-n", "2", "--name", "kid"]);
    assert_eq!(images(&machines), 1);
    machines.good(&["kill", "kid-0"]);
    machines.run(&["wait", "kid-0"]);
    machines.good(&["ps"]);
    assert_eq!(images(&machines), 1, "the other one still needs it");
    // A difference to an image would have a parent that goes away.
    let kept = tempfile::tempdir().unwrap();
    let target = kept.path().join("diff").to_str().unwrap().to_owned();
    let refused = machines.bad(&["snapshot", "kid-1", "--diff", "--to", &target]);
    assert!(refused.contains("take a full one first"), "{refused}");
    machines.good(&["snapshot", "kid-1", "--to", &target]);
    assert!(kill_process(pid(&machines, "kid-1"), "KILL"));
    eventually("the image is swept", || {
        machines.good(&["ps", "-a"]);
        images(&machines) == 0
    });
    // What was kept of a clone needs no image.
    machines.good(&["fork", &target, "--name", "later"]);
    assert_eq!((images(&machines), machines.inspect("later")["state"].as_str()), (0, Some("running")));
    assert_eq!(machines.inspect("base")["state"], "running");
}

#[test]
fn a_fork_that_cannot_be_leaves_nothing() {
    let machines = Machines::new();
    let kernel = KernelFile::new(Code::default().spin());
    machines.good(&["run", "-d", "--name", "base", "--memory", "32M", "--kernel", &kernel.path]);
    machines.good(&["run", "-d", "--name", "kid-2", "--memory", "32M", "--kernel", &kernel.path]);
    for (arguments, reason) in [
        (&["fork", "base", "-n", "0"][..], "-n 0: give 1 to 10000"),
        (&["fork", "base", "-n", "-1"], "-n -1: give"),
        (&["fork", "base", "-n", "many"], "-n many: give"),
        (&["fork", "nobody"], "there is neither a machine nor a snapshot 'nobody'"),
        (&["fork", "base", "--name", "not a name"], "is not a name for a machine"),
        (&["fork", "base", "--engine", "steam"], "steam"),
        // The third of them is there already.
        (&["fork", "base", "-n", "4", "--name", "kid"], "there is a machine 'kid-2' already"),
    ] {
        let said = machines.bad(arguments);
        assert!(said.contains(reason), "{arguments:?}: {said}");
    }
    let names: BTreeSet<String> = machines.states().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, BTreeSet::from(["base".to_owned(), "kid-2".to_owned()]));
    assert_eq!((images(&machines), machines.inspect("base")["state"].as_str()), (0, Some("running")));
}

#[test]
fn clones_have_an_input_of_their_own_where_it_is_asked_for() {
    let machines = Machines::new();
    let run = ["run", "-d", "-i", "--name", "base", "--memory", "128M", "--", "sh", "-c"];
    machines.good(&[&run[..], &["echo up; read line; echo got $line"]].concat());
    eventually("it waits for input", || machines.good(&["logs", "base"]).contains("up"));
    machines.good(&["fork", "base", "-i", "--name", "kid"]);
    machines.good(&["fork", "base", "--name", "deaf"]);
    let mut attach = machines.command(&["attach", "kid"]);
    let mut child = attach.stdin(std::process::Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"hello\n").unwrap();
    let attached = crate::support::wait(child);
    assert!(attached.status.success(), "{attached:?}");
    assert_eq!(machines.good(&["logs", "kid"]), "got hello\n");
    assert_eq!(machines.run(&["wait", "deaf"]).1.trim(), "0");
    assert_eq!(machines.good(&["logs", "deaf"]), "got\n", "its input is empty");
    assert_eq!(machines.inspect("base")["state"], "running");
}

/// Memory of a process that nobody else has, in its heap and its program's file, in KiB.
fn own_kib(pid: u64) -> u64 {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let program = program.to_str().unwrap().to_owned();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut counts, mut sum) = (false, 0);
    for line in maps.lines() {
        match line.strip_prefix("Private_Dirty:") {
            Some(kib) if counts => sum += kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap(),
            _ if line.ends_with("[heap]") || line.ends_with(&program) => counts = true,
            // Another mapping begins with its addresses.
            _ if line.split(' ').next().is_some_and(|word| word.contains('-')) => counts = false,
            _ => {}
        }
    }
    sum
}

#[test]
fn clones_share_what_every_monitor_makes_for_itself() {
    let machines = Machines::new();
    machines.good(&["run", "-d", "--name", "base", "--memory", "128M", "--", "sleep", "1000"]);
    machines.good(&["fork", "base", "-n", "3", "--name", "kid"]);
    let base = own_kib(pid(&machines, "base"));
    for name in ["kid-0", "kid-1", "kid-2"] {
        let pid = pid(&machines, name);
        // What is free is given back when the machine has settled.
        eventually("it shares", || own_kib(pid) * 2 < base);
    }
    for name in ["kid-0", "kid-1", "kid-2", "base"] {
        machines.good(&["kill", name]);
    }
}
