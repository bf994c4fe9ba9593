//! Prints what is generated from the tables: `header` or `markdown`.

use std::process::ExitCode;

use harrier_hypercall_abi::reference;

fn main() -> ExitCode {
    let mut text = String::new();
    let written = match std::env::args().nth(1).as_deref() {
        Some("header") => reference::c_header(&mut text),
        Some("markdown") => reference::markdown(&mut text),
        _ => {
            eprintln!("say what: header or markdown");
            return ExitCode::FAILURE;
        }
    };
    match written {
        Ok(()) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}
