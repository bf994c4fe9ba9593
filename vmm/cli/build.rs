//! Compiles the system-call policy, so that no run spends time on it.

use std::fmt::Write;
use std::{env, error, fs, path};

fn main() -> Result<(), Box<dyn error::Error>> {
    let policy = "../../resources/seccomp.json";
    println!("cargo::rerun-if-changed={policy}");
    let filters = seccompiler::compile_from_json(fs::File::open(policy)?, seccompiler::TargetArch::x86_64)?;
    let mut text = String::from("&[\n");
    for (name, program) in &filters {
        let instructions: Vec<_> = program.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect();
        writeln!(text, "({name:?}, &{instructions:?}),")?;
    }
    text.push(']');
    let out = path::Path::new(&env::var("OUT_DIR")?).join("seccomp.rs");
    fs::write(out, text)?;
    Ok(())
}
