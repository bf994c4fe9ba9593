//! `harrier selftest`: a report of what the engines do on this host.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Code, cache, harrier, output, texts, wait};

fn report(args: &[&str]) -> (i32, Value) {
    report_in(&cache(), args)
}

fn report_in(cache: &std::path::Path, args: &[&str]) -> (i32, Value) {
    let args = [&["selftest", "--json"], args].concat();
    let (code, stdout, stderr) = texts(wait(harrier(&args).env("HARRIER_CACHE", cache).spawn().unwrap()));
    assert_eq!(stderr, "", "nobody looks at a terminal");
    (code, serde_json::from_str(&stdout).unwrap_or_else(|err| panic!("{err}: {stdout}")))
}

/// Check, engine and result.
fn rows(report: &Value) -> Vec<[&str; 3]> {
    let rows = report["checks"].as_array().unwrap();
    rows.iter().map(|row| ["check", "engine", "result"].map(|name| row[name].as_str().unwrap())).collect()
}

#[test]
fn guests_and_linux_pass_in_software_and_are_timed() {
    let (code, report) = report(&["--engine", "soft", "--only", "integer", "--only", "linux"]);
    assert_eq!(code, 0, "{report}");
    let all = ["integer", "linux-true", "linux-checksum"].map(|check| [check, "soft", "passed"]);
    assert_eq!(rows(&report), all);
    for row in report["checks"].as_array().unwrap() {
        assert!(row["milliseconds"].as_f64().is_some_and(|time| time > 1.0), "{row}");
    }
    let boot = &report["checks"][1]["timings_ms"]["kernel_entry_to_agent"];
    assert!(boot.as_f64().is_some_and(|time| time > 1.0), "{report}");
    assert_eq!((&report["passed"], &report["failed"]), (&3.into(), &0.into()));
    let host = report["host"]["findings"].as_array().unwrap();
    for name in ["engine soft", "engine kvm", "host kernel", "cpus"] {
        assert!(host.iter().any(|finding| finding["name"] == name), "{name} is missing in {host:?}");
    }
    for item in report["not_exercised"].as_array().unwrap() {
        assert!(item["path"].is_string() && item["needs"].is_string(), "{item}");
    }
}

#[test]
fn without_a_name_every_engine_has_a_row_and_one_that_is_missing_is_skipped_with_the_reason() {
    let (code, report) = report(&["--only", "devices"]);
    assert_eq!(code, 0, "{report}");
    let rows = rows(&report);
    assert_eq!(rows[0], ["devices", "soft", "passed"]);
    let has_kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if has_kvm {
        assert_eq!(rows[1], ["devices", "kvm", "passed"]);
        assert!(rows[2..].iter().all(|row| *row == ["devices", "kvm-alone", "passed"]), "{rows:?}");
    } else {
        assert_eq!(rows[1..], [["devices", "kvm", "skipped"]]);
        assert!(report["checks"][1]["reason"].as_str().unwrap().contains("/dev/kvm"), "{report}");
    }
}

#[test]
fn a_table_for_people_ends_with_the_sums() {
    let (code, stdout, stderr) = texts(output(&["selftest", "--engine", "soft", "--only", "fpu"]));
    assert_eq!((code, stderr.as_str()), (0, ""));
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].starts_with("CHECK   ENGINE   RESULT   MS"), "{stdout}");
    assert!(lines[1].starts_with("fpu     soft     passed   "), "{stdout}");
    assert!(
        stdout.contains("\nThis host\n") && stdout.ends_with("\n1 passed, 0 failed, 0 skipped\n"),
        "{stdout}"
    );
}

#[test]
fn a_guest_that_says_something_wrong_and_one_that_hangs_are_failures_with_exit_code_1() {
    let cache = tempfile::tempdir().unwrap();
    let folder = cache.path().join("bare-metal/current");
    std::fs::create_dir_all(&folder).unwrap();
    let put = |name: &str, code: Code| std::fs::write(folder.join(name), code.kernel()).unwrap();
    put("integer", Code::default().print("ok a\nnot ok b\ndone 1 1 0\n").out(0xf4, 0));
    // Both hang: one asleep, one awake.
    put("strings", Code::default().print("ok a\n").halt());
    put("smp", Code::default().print("ok a\n").spin());
    // It passes what it checks, which is too little.
    put("fpu", Code::default().print("ok a\ndone 1 0 0\n").out(0xf4, 0));
    let started = Instant::now();
    let names = ["integer", "strings", "smp", "fpu", "paging"];
    let mut args = vec!["--engine", "soft", "--timeout", "500ms"];
    args.extend(names.iter().flat_map(|name| ["--only", name]));
    let (code, report) = report_in(cache.path(), &args);
    assert_eq!(code, 1, "{report}");
    assert!(started.elapsed() < Duration::from_secs(30));
    assert_eq!(report["failed"], names.len());
    let reason = |name: &str| {
        let rows = report["checks"].as_array().unwrap();
        let row = rows.iter().find(|row| row["check"] == name).unwrap();
        assert_eq!(row["result"], "failed");
        row["reason"].as_str().unwrap().to_owned()
    };
    assert!(reason("integer").starts_with("not ok b"), "{report}");
    for name in ["strings", "smp"] {
        assert!(reason(name).starts_with("it has not come to an end in 500ms"), "{report}");
    }
    assert!(reason("fpu").starts_with("1 checks instead of 130"), "{report}");
    assert!(reason("paging").contains("does not exist"), "{report}");
}

#[test]
fn what_cannot_be_run_is_one_line_with_the_remedy() {
    let cache = tempfile::tempdir().unwrap();
    let refused = |args: &[&str], text: &str| {
        let args = [&["selftest"], args].concat();
        let (code, stdout, stderr) =
            texts(wait(harrier(&args).env("HARRIER_CACHE", cache.path()).spawn().unwrap()));
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (125, "", 1), "{stderr}");
        assert!(stderr.contains(text), "{stderr}");
    };
    refused(&[], "bare-metal/current' is missing): run `cargo xtask setup`");
    refused(&["--only", "pentium"], "--only 'pentium' is no check: use one of integer, strings");
    refused(&["--engine", "bochs"], "unknown engine 'bochs'");
    refused(&["--timeout", "never"], "'never' is not a time");
    // Linux alone needs no such guests; this cache has none either.
    let (code, report) = report_in(cache.path(), &["--engine", "soft", "--only", "linux-true"]);
    assert_eq!(code, 1);
    let reason = report["checks"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("guest kernel not built"), "{reason}");
}
