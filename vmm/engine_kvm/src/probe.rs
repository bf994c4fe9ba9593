//! Whether the host's KVM can run a machine: the device, its API version and the capabilities.
//!
//! [`open`] gives a [`Host`] or a [`Missing`], whose text says what would change it.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_IOEVENTFD, KVM_CAP_IRQFD, KVM_CAP_READONLY_MEM,
    KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_SYNC_REGS, KVM_CAP_TSC_CONTROL, KVM_CAP_XCRS, KVM_CAP_XSAVE2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

/// The version of the KVM API since Linux 2.6.22; no other was ever released since.
const API_VERSION: i32 = 12;

/// What an engine without fallback code needs (Documentation/virt/kvm/api.rst of Linux). All are in 5.10 and later.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SplitIrqchip, "SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "SIGNAL_MSI"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::MpState, "MP_STATE"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::Debugregs, "DEBUGREGS"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::AdjustClock, "ADJUST_CLOCK"),
    (Cap::TscDeadlineTimer, "TSC_DEADLINE_TIMER"),
    (Cap::GetTscKhz, "GET_TSC_KHZ"),
    (Cap::Xsave, "XSAVE"),
];

/// What is used where it is there.
const USED: &[(u32, &str)] = &[
    (KVM_CAP_IRQFD, "IRQFD"),
    (KVM_CAP_IOEVENTFD, "IOEVENTFD"),
    (KVM_CAP_READONLY_MEM, "READONLY_MEM"),
    (KVM_CAP_XCRS, "XCRS"),
    (KVM_CAP_XSAVE2, "XSAVE2"),
    (KVM_CAP_SYNC_REGS, "SYNC_REGS"),
    (KVM_CAP_TSC_CONTROL, "TSC_CONTROL"),
    (KVM_CAP_SET_IDENTITY_MAP_ADDR, "SET_IDENTITY_MAP_ADDR"),
    (KVM_CAP_EXIT_ON_EMULATION_FAILURE, "EXIT_ON_EMULATION_FAILURE"),
];

/// Why KVM cannot be used, with the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Missing {
    #[error(
        "{0} does not exist: load the module kvm_intel or kvm_amd, and enable virtualization in the firmware \
         (or, inside a virtual machine, nested virtualization)"
    )]
    Device(String),
    #[error("no permission to open {0}: add the user to the group that owns it, usually kvm")]
    Permission(String),
    #[error("{0} is busy: another hypervisor uses the processor's virtualization, stop it first")]
    Busy(String),
    #[error("{path} cannot be opened: {source}")]
    Open { path: String, source: std::io::Error },
    #[error("KVM cannot create a virtual machine: {0}")]
    CreateVm(std::io::Error),
    #[error("{0} is not KVM: it does not answer to KVM's requests")]
    NotKvm(String),
    #[error(
        "KVM's API has version {0}, this program needs {API_VERSION}: use a Linux kernel of version 5.10 or later"
    )]
    Version(i32),
    #[error("KVM lacks the capabilities {0}: use a Linux kernel of version 5.10 or later")]
    Capabilities(String),
}

/// An open KVM with everything that is needed.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) kvm: Kvm,
    path: String,
}

impl Host {
    /// Creates an empty VM, trying again when a signal or another process came in between.
    ///
    /// # Errors
    /// [`Missing::Busy`] if another hypervisor has the processor, [`Missing::Open`] if KVM refuses otherwise.
    pub(crate) fn create_vm(&self) -> Result<VmFd, Missing> {
        let mut tries = 0;
        loop {
            match self.kvm.create_vm() {
                Ok(vm) => return Ok(vm),
                Err(err) if matches!(err.errno(), libc::EINTR | libc::EAGAIN) && tries < 5 => tries += 1,
                Err(err) if err.errno() == libc::EBUSY => return Err(Missing::Busy(self.path.clone())),
                Err(err) => return Err(Missing::CreateVm(err.into())),
            }
        }
    }
}

/// Opens KVM and checks it.
///
/// # Errors
/// [`Missing`] with the cause and its remedy.
pub(crate) fn open(path: &Path) -> Result<Host, Missing> {
    let name = path.display().to_string();
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Missing::Device(name.clone()))?;
    let kvm = Kvm::new_with_path(c_path).map_err(|err| match err.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ENOTDIR => Missing::Device(name.clone()),
        libc::EACCES | libc::EPERM => Missing::Permission(name.clone()),
        libc::EBUSY => Missing::Busy(name.clone()),
        _ => Missing::Open { path: name.clone(), source: err.into() },
    })?;
    match kvm.get_api_version() {
        API_VERSION => {}
        -1 => return Err(Missing::NotKvm(name)),
        version => return Err(Missing::Version(version)),
    }
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(Missing::Capabilities(missing.join(" ")));
    }
    Ok(Host { kvm, path: name })
}

/// The capabilities that KVM lacks of those that are used where they are there.
pub(crate) fn unused_capabilities(host: &Host) -> Vec<&'static str> {
    let missing = USED.iter().filter(|(cap, _)| host.kvm.check_extension_raw((*cap).into()) <= 0);
    missing.map(|(_, name)| *name).collect()
}

/// Where KVM's device is on Linux.
pub(crate) fn default_path() -> PathBuf {
    PathBuf::from("/dev/kvm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_named_with_the_remedy() {
        let text = open(Path::new("/nonexistent/kvm")).unwrap_err().to_string();
        assert!(text.starts_with("/nonexistent/kvm does not exist: load the module"), "{text}");
    }

    #[test]
    fn something_else_than_kvm_is_refused() {
        let text = open(Path::new("/dev/null")).unwrap_err().to_string();
        assert_eq!(text, "/dev/null is not KVM: it does not answer to KVM's requests");
    }

    #[test]
    fn a_path_with_a_zero_byte_is_no_device() {
        let path = Path::new(std::ffi::OsStr::from_bytes(b"/dev/k\0vm"));
        assert!(matches!(open(path), Err(Missing::Device(_))));
    }
}
