//! System-call filters: what each thread may ask of the host once a guest can reach it.
//!
//! The policy is `resources/seccomp.json`. The threads that touch what a guest says (vCPUs and event loop) may
//! make only the calls listed for them; the rest of the process is denied the calls that it never needs. A call
//! that is not allowed fails with EPERM.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use harrier_machine::{Machine, ThreadRole};
use seccompiler::{BpfProgram, TargetArch};

use crate::exit::Failure;

const POLICY: &str = include_str!("../../../resources/seccomp.json");

/// Filters the calling thread and, when the machine starts, its threads.
pub(crate) fn enter(machine: &mut Machine) -> Result<(), Failure> {
    let failed = |err: String| {
        Failure::new(format!("system-call filter: {err}: use --no-seccomp where the kernel has no seccomp"))
    };
    let filters = Arc::new(compile().map_err(failed)?);
    apply(&filters, "process").map_err(|err| failed(err.to_string()))?;
    machine.on_thread_start(Arc::new(move |role| {
        let name = match role {
            ThreadRole::Vcpu => "vcpu",
            ThreadRole::Events => "events",
        };
        apply(&filters, name)
    }));
    Ok(())
}

fn compile() -> Result<HashMap<String, BpfProgram>, String> {
    seccompiler::compile_from_json(POLICY.as_bytes(), TargetArch::x86_64).map_err(|err| err.to_string())
}

fn apply(filters: &HashMap<String, BpfProgram>, name: &str) -> io::Result<()> {
    let filter = filters
        .get(name)
        .ok_or_else(|| io::Error::other(format!("no system-call filter is called '{name}'")))?;
    seccompiler::apply_filter(filter).map_err(|err| io::Error::other(format!("system-call filter: {err}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_compiles_and_names_every_role() {
        let filters = compile().unwrap();
        for name in ["vcpu", "events", "process"] {
            assert!(filters.contains_key(name), "{name}");
        }
    }

    #[test]
    fn a_filtered_thread_cannot_start_programs_or_open_files() {
        let filters = compile().unwrap();
        std::thread::spawn(move || {
            apply(&filters, "vcpu").unwrap();
            let opened = std::fs::File::open("/proc/self/status");
            assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EPERM));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_filtered_process_cannot_trace_or_execute() {
        let filters = compile().unwrap();
        std::thread::spawn(move || {
            apply(&filters, "process").unwrap();
            let started = std::process::Command::new("/bin/true").status();
            assert_eq!(started.unwrap_err().raw_os_error(), Some(libc::EPERM));
        })
        .join()
        .unwrap();
    }
}
