//! Hypercalls from the command line: exit codes, the console, and what --timings and --json show of them.

use harrier_hypercall_abi::calls::{MarkArgs, number};
use serde_json::Value;

use crate::support::{Code, KernelFile, output, texts};

fn guest() -> Code {
    let mut name = [0; 32];
    name[..6].copy_from_slice(b"loaded");
    let kernel = MarkArgs { phase: 1, ..MarkArgs::default() };
    let own = MarkArgs { value: 9, name, ..MarkArgs::default() };
    Code::default()
        .hypercall(number::MARK, &kernel.to_bytes())
        .print("by port, ")
        .print_by_call("by call, ")
        .print("by port again\n")
        .release_a_page()
        .hypercall(number::MARK, &own.to_bytes())
}

#[test]
fn a_guest_that_is_done_gives_the_exit_code_and_its_whole_console() {
    for code in [0, 7, 255] {
        let kernel = KernelFile::new(guest().exit(code, 0, ""));
        let (exit, stdout, stderr) = texts(output(&["run", "--kernel", &kernel.path]));
        let expected = (code as i32, "by port, by call, by port again\n", "");
        assert_eq!((exit, stdout.as_str(), stderr.as_str()), expected);
    }
}

#[test]
fn a_guest_that_failed_gives_its_code_and_says_why() {
    let kernel = KernelFile::new(Code::default().exit(3, 1, "no disk"));
    let (exit, stdout, stderr) = texts(output(&["run", "--kernel", &kernel.path]));
    let message = "harrier: the guest ended with code 3 (failed): 'no disk'\n";
    assert_eq!((exit, stdout.as_str(), stderr.as_str()), (3, "", message));
}

#[test]
fn marks_are_in_the_timings_and_in_the_object() {
    let kernel = KernelFile::new(guest().exit(0, 0, ""));
    let (_, _, stderr) = texts(output(&["run", "--kernel", &kernel.path, "--timings"]));
    for label in ["mark kernel ", "mark loaded "] {
        assert!(stderr.lines().any(|line| line.starts_with(label) && line.ends_with(" ms")), "{stderr}");
    }
    let (exit, stdout, _) = texts(output(&["run", "--kernel", &kernel.path, "--json"]));
    let object: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((exit, &object["exit_code"]), (0, &Value::from(0)));
    assert_eq!(object["machine_end"], "the guest ended with code 0 (done)");
    let marks = object["marks"].as_array().unwrap();
    let told: Vec<_> = marks.iter().map(|mark| (&mark["label"], &mark["phase"], &mark["value"])).collect();
    assert_eq!(told, [(&"kernel".into(), &1.into(), &0.into()), (&"loaded".into(), &0.into(), &9.into())]);
    assert!(marks.iter().all(|mark| mark["since_first_instruction_ms"].is_f64()));
    assert_eq!((&object["console_calls"], &object["released_bytes"]), (&1.into(), &4096.into()));
}
