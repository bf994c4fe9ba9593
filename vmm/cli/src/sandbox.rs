//! System-call filters: what each thread may ask of the host once a guest can reach it.
//!
//! The policy is `resources/seccomp.json`. The threads that touch what a guest says (vCPUs and event loop) may
//! make only the calls listed for them; the rest of the process is denied the calls that it never needs. A call
//! that is not allowed fails with EPERM.

use std::io;
use std::sync::Arc;

use harrier_machine::{Machine, ThreadRole};
use seccompiler::{BpfProgram, sock_filter};

use crate::exit::Failure;

/// A filter's instructions: code, jump if true, jump if false, operand.
type Instructions = &'static [(u16, u8, u8, u32)];

/// The policy, compiled by the build script: role and filter.
const FILTERS: &[(&str, Instructions)] = include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));

/// Filters the calling thread and, when the machine starts, its threads.
pub(crate) fn enter(machine: &mut Machine) -> Result<(), Failure> {
    apply("process")
        .map_err(|err| Failure::new(format!("{err}: use --no-seccomp where the kernel has no seccomp")))?;
    machine.on_thread_start(Arc::new(|role| {
        apply(match role {
            ThreadRole::Vcpu => "vcpu",
            ThreadRole::Events => "events",
        })
    }));
    Ok(())
}

/// Filters the calling thread, which serves the control socket, and the threads that it starts.
pub(crate) fn enter_control() -> io::Result<()> {
    apply("control")
}

fn apply(role: &str) -> io::Result<()> {
    let (_, instructions) = FILTERS
        .iter()
        .find(|(name, _)| *name == role)
        .ok_or_else(|| io::Error::other(format!("no system-call filter is called '{role}'")))?;
    let program: BpfProgram =
        instructions.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect();
    seccompiler::apply_filter(&program).map_err(|err| io::Error::other(format!("system-call filter: {err}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filtered_thread_cannot_start_programs_or_open_files() {
        std::thread::spawn(|| {
            apply("vcpu").unwrap();
            let opened = std::fs::File::open("/proc/self/status");
            assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EPERM));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_control_thread_and_those_it_starts_cannot_open_files() {
        std::thread::spawn(|| {
            enter_control().unwrap();
            let opened = || std::fs::File::open("/proc/self/status").unwrap_err().raw_os_error();
            assert_eq!(opened(), Some(libc::EPERM));
            assert_eq!(std::thread::spawn(opened).join().unwrap(), Some(libc::EPERM));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_filtered_process_cannot_trace_or_execute() {
        std::thread::spawn(|| {
            apply("process").unwrap();
            let started = std::process::Command::new("/bin/true").status();
            assert_eq!(started.unwrap_err().raw_os_error(), Some(libc::EPERM));
        })
        .join()
        .unwrap();
    }
}
