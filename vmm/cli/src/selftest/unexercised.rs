//! Which parts of Harrier no selftest can reach on this host, and what would reach them.

use harrier_engine::{CpuModel, Engine};
use harrier_engine_kvm::{Calibration, KvmEngine};
use harrier_engine_soft::SoftEngine;

/// A code path that this host does not reach.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unexercised {
    pub(super) path: String,
    /// What would reach it.
    pub(super) needs: String,
}

/// What the list depends on.
struct Host {
    kvm: Result<Calibration, String>,
    missing_capabilities: Vec<&'static str>,
    vendor: Vendor,
    cpus: usize,
    models: Vec<CpuModel>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Amd,
    Intel,
    Other,
}

const HARDWARE: &str =
    "a host whose KVM has VT-x or SVM: not in a virtual machine, or in one with nested virtualization";

/// The list for this host.
pub(super) fn here() -> Vec<Unexercised> {
    let kvm = KvmEngine::default();
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let vendor = match info.lines().find_map(|line| line.strip_prefix("vendor_id")) {
        Some(text) if text.contains("AuthenticAMD") || text.contains("HygonGenuine") => Vendor::Amd,
        Some(text) if text.contains("GenuineIntel") => Vendor::Intel,
        _ => Vendor::Other,
    };
    list(&Host {
        kvm: kvm.calibrate().map_err(|err| err.to_string()),
        missing_capabilities: kvm.missing_capabilities().unwrap_or_default(),
        vendor,
        cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        models: SoftEngine.cpu_models(),
    })
}

fn list(host: &Host) -> Vec<Unexercised> {
    let mut list = Vec::new();
    let mut add = |path: &str, needs: &str| {
        list.push(Unexercised { path: path.to_owned(), needs: needs.to_owned() });
    };
    match &host.kvm {
        Err(reason) => {
            add("the whole KVM engine", &format!("a host whose /dev/kvm can be used ({reason})"));
            add("--engine auto with a choice", "the same");
        }
        Ok(speeds) if speeds.kernel_mode_in_hardware => {
            add(
                "user code lent to the processor while kernel mode runs in software",
                "a host whose KVM emulates kernel mode, such as one with the module kvm_pvm",
            );
            add(
                "the assist: instructions that KVM's emulator does not know, finished in software",
                "the same, or an Intel processor without unrestricted guest mode",
            );
            match host.vendor {
                Vendor::Amd => add("Intel VT-x", "a host with an Intel processor"),
                Vendor::Intel => add("AMD SVM", "a host with an AMD processor"),
                Vendor::Other => add("Intel VT-x and AMD SVM", "hosts with such processors"),
            }
        }
        Ok(_) => {
            add(
                "kernel mode of the guest on the processor (VT-x, SVM), with the exits that it makes",
                HARDWARE,
            );
            add(
                "local APICs in the host's kernel with the I/O APIC here (split irqchip) at full speed, and start-up messages \
                 to further vCPUs through them; 'kvm-alone' tries the rest of them",
                HARDWARE,
            );
            add("interrupts that the processor delivers itself (APICv, AVIC)", HARDWARE);
            add(
                "guest page tables walked by the processor (EPT, NPT), and the dirty log of their writes",
                HARDWARE,
            );
            add("a CPU model that the processor enforces: CPUID and XCR0 as the guest sees them", HARDWARE);
            add("an offset or another frequency of the TSC after a restore", HARDWARE);
            add("an entry into the guest that the processor refuses (KVM_EXIT_FAIL_ENTRY)", HARDWARE);
        }
    }
    if !host.missing_capabilities.is_empty() {
        let names = host.missing_capabilities.join(" ");
        add(&format!("what uses the KVM capabilities {names}"), "a host whose KVM has them");
    }
    if host.cpus < 2 {
        add("two vCPUs that run at the same time", "a host with two processors or more");
    }
    if !host.models.contains(&CpuModel::V3) {
        add("the CPU model v3", "a processor with AVX2, BMI and FMA");
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(kvm: Result<f64, &str>, vendor: Vendor) -> Host {
        Host {
            kvm: kvm.map_err(str::to_owned).map(|kernel_mips| Calibration {
                kernel_mips,
                user_mips: 5000.0,
                kernel_mode_in_hardware: kernel_mips > 100.0,
            }),
            missing_capabilities: Vec::new(),
            vendor,
            cpus: 2,
            models: vec![CpuModel::V3],
        }
    }

    fn paths(host: &Host) -> String {
        list(host).into_iter().map(|item| format!("{}: {}\n", item.path, item.needs)).collect()
    }

    #[test]
    fn each_kind_of_host_names_what_the_others_reach() {
        let emulating = paths(&host(Ok(1.5), Vendor::Amd));
        assert!(emulating.contains("VT-x, SVM") && emulating.contains("split irqchip"), "{emulating}");
        assert!(!emulating.contains("lent"), "{emulating}");
        let amd = paths(&host(Ok(3000.0), Vendor::Amd));
        assert!(amd.contains("lent") && amd.contains("Intel VT-x") && !amd.contains("AMD SVM"), "{amd}");
        assert!(paths(&host(Ok(3000.0), Vendor::Intel)).contains("AMD SVM: a host with an AMD processor"));
        let without = paths(&host(Err("/dev/kvm does not exist"), Vendor::Intel));
        assert!(
            without.starts_with("the whole KVM engine: a host whose /dev/kvm can be used (/dev/kvm does")
        );
        let small = Host {
            cpus: 1,
            models: vec![CpuModel::V2],
            missing_capabilities: vec!["IRQFD"],
            ..host(Ok(1.5), Vendor::Amd)
        };
        let small = paths(&small);
        assert!(
            small.contains("two vCPUs") && small.contains("model v3") && small.contains("capabilities IRQFD")
        );
    }
}
