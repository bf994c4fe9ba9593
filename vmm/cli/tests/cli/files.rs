//! `--input` and `--output` of `harrier run`, in the default guest. They need what `cargo xtask setup` makes.

use std::fs;
use std::path::Path;

use crate::support::{output, texts};

fn run(args: &[&str]) -> (i32, String, String) {
    texts(output(&[&["run", "--quiet"], args].concat()))
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn files_go_in_and_come_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let data: Vec<u8> = (0..2_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(path("data"), &data).unwrap();
    fs::write(path("program"), "#!/bin/sh\ncat data data > twice; sha256sum < data; ls -l /etc/made/here\n")
        .unwrap();
    fs::set_permissions(path("program"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::write(path("twice"), "before").unwrap();
    let (code, stdout, stderr) = run(&[
        "--workdir",
        "/tmp",
        "--input",
        &path("data"),
        "--input",
        &path("program"),
        "--input",
        &format!("{}:/etc/made/here", path("program")),
        "--output",
        &format!("twice:{}", path("twice")),
        "--json",
        "--",
        "./program",
    ]);
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let said = json["stdout"].as_str().unwrap();
    let digest = |path: String| {
        let output = std::process::Command::new("sha256sum").arg(path).output().unwrap();
        String::from_utf8(output.stdout).unwrap()[..64].to_owned()
    };
    assert!(said.starts_with(&digest(path("data"))), "{said}");
    assert!(said.contains("-rwxr-xr-x") && said.contains("root"), "{said}");
    assert!(fs::read(path("twice")).unwrap() == [data.clone(), data].concat());
    let file = &json["outputs"][0];
    assert_eq!((&file["guest"], &file["host"]), (&"/tmp/twice".into(), &path("twice").into()));
    assert_eq!((&file["bytes"], &file["sha256"]), (&4_000_000.into(), &digest(path("twice")).into()));
    assert_eq!(names(folder.path()), ["data", "program", "twice"]);
}

#[test]
fn an_output_that_the_command_did_not_write_is_a_failure_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (there, missing) = (format!("/there:{}", path("there")), format!("/missing:{}", path("missing")));
    let script = |code: u8| format!("echo it is > /there; exit {code}");
    let flags = ["--output", &there, "--output", &missing];
    let (code, _, stderr) = run(&[&flags[..], &["--", "sh", "-c", &script(0)]].concat());
    assert_eq!((code, stderr.lines().count()), (125, 1), "{stderr}");
    assert!(stderr.contains("--output: \"/missing\" in the guest cannot be read"), "{stderr}");
    assert_eq!(names(folder.path()), ["there"]);
    // A command that has failed has a better answer than that.
    let (code, _, stderr) = run(&[&flags[..], &["--", "sh", "-c", &script(3)]].concat());
    assert_eq!((code, stderr.as_str()), (3, ""));
    assert_eq!(fs::read_to_string(path("there")).unwrap(), "it is\n");
    // A machine that does not come to an end in good order gives no files.
    fs::remove_file(path("there")).unwrap();
    let script = "echo half > /there; poweroff -f; sleep 100";
    let (code, _, stderr) = run(&["--output", &there, "--", "sh", "-c", script]);
    assert_eq!((code, stderr.lines().count()), (125, 1), "{stderr}");
    let (code, _, _) =
        run(&["--timeout", "4s", "--output", &there, "--", "sh", "-c", "echo > /there; sleep 100"]);
    assert_eq!(code, 124);
    assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
}

#[test]
fn what_cannot_be_copied_is_said_before_or_instead_of_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("file"), "x").unwrap();
    let none = path("none");
    let nowhere = format!("/x:{}", path("no/such/folder/x"));
    let onto_folder = format!("{}:/etc", path("file"));
    let no_folder = format!("{}:/etc/passwd/x", path("file"));
    for (flags, text) in [
        (["--input", &none], "none' cannot be read"),
        (["--output", &nowhere], "cannot be written (No such file"),
        (["--input", &onto_folder], "\"/etc\" in the guest cannot be written"),
        (["--input", &no_folder], "\"/etc/passwd/x\" in the guest cannot be written"),
        (["--input", ":/x"], "names no file"),
        (["--output", "dir/"], "names no file"),
        (["--output-limit", "x"], "--output-limit"),
    ] {
        let (code, stdout, stderr) = run(&[&flags[..], &["--", "echo", "ran"]].concat());
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (125, "", 1), "{stderr}");
        assert!(stderr.starts_with("harrier: ") && stderr.contains(text), "{flags:?}: {stderr}");
    }
    let limited = format!("/big:{}", path("big"));
    let script = "head -c 5000 /dev/zero > /big";
    let (code, _, stderr) = run(&["--output-limit", "4K", "--output", &limited, "--", "sh", "-c", script]);
    assert_eq!(code, 125);
    assert!(stderr.contains("longer than the 4096 bytes that are taken"), "{stderr}");
    assert_eq!(names(folder.path()), ["file"]);
}
