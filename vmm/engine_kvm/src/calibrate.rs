//! How fast this host's KVM runs kernel mode and user mode.
//!
//! There are hosts whose KVM runs only user mode on the processor and emulates kernel mode instruction by
//! instruction; a few thousand instructions at privilege level 0 tell.

use harrier_engine::EngineError;
use harrier_engine::calibrate::Loop;

use crate::KvmEngine;

/// Speeds in million instructions a second, of a loop in registers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// At privilege level 0.
    pub kernel_mips: f64,
    /// At privilege level 3.
    pub user_mips: f64,
    /// Whether kernel mode runs on the processor. Where it does not, it is emulated in software, and Harrier's own
    /// software processor does that faster.
    pub kernel_mode_in_hardware: bool,
}

/// No emulator of single instructions comes near this, and no processor falls below it.
const SLOWEST_HARDWARE_MIPS: f64 = 100.0;

/// Measures both levels on this KVM.
pub(crate) fn measure(kvm: &KvmEngine) -> Result<Calibration, EngineError> {
    with_loop(kvm, |guest| {
        let kernel_mips = guest.mips(0)?;
        let kernel_mode_in_hardware = kernel_mips >= SLOWEST_HARDWARE_MIPS;
        Ok(Calibration { kernel_mips, user_mips: guest.mips(3)?, kernel_mode_in_hardware })
    })
}

/// Whether this KVM runs kernel mode on the processor.
pub(crate) fn kernel_mode_in_hardware(kvm: &KvmEngine) -> Result<bool, EngineError> {
    with_loop(kvm, |guest| guest.reaches(0, SLOWEST_HARDWARE_MIPS))
}

fn with_loop<T>(
    kvm: &KvmEngine,
    ask: impl FnOnce(&mut Loop) -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    let mut guest = Loop::new(&kvm.without_software())?;
    let answer = ask(&mut guest);
    // Taking a VM down takes the kernel some milliseconds, for which nobody should wait. Without a thread it
    // happens here.
    let _ = std::thread::Builder::new().name("vm-close".to_owned()).spawn(move || drop(guest));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_finds_user_mode_on_the_processor() {
        match KvmEngine::default().calibrate() {
            Ok(found) => {
                println!("{found:?}");
                assert!(found.user_mips > SLOWEST_HARDWARE_MIPS, "{found:?}");
                assert!(found.kernel_mips > 0.01, "{found:?}");
            }
            Err(err) => println!("skipped: calibration: {err}"),
        }
    }

    #[test]
    fn the_short_question_has_the_same_answer_as_the_measurement() {
        let kvm = KvmEngine::default();
        match kvm.calibrate() {
            Ok(found) => {
                assert_eq!(kernel_mode_in_hardware(&kvm).unwrap(), found.kernel_mode_in_hardware);
                let user = with_loop(&kvm, |guest| guest.reaches(3, SLOWEST_HARDWARE_MIPS));
                assert!(user.unwrap(), "{found:?}");
            }
            Err(err) => println!("skipped: calibration: {err}"),
        }
    }

    #[test]
    fn a_host_without_kvm_is_told_so() {
        let error = measure(&KvmEngine::with_device("/nonexistent/kvm".into())).unwrap_err().to_string();
        assert!(
            error.starts_with("the kvm engine is not available: /nonexistent/kvm does not exist"),
            "{error}"
        );
    }
}
