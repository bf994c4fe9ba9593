//! How runs end, pause and stop, with an engine that plays back a list of actions instead of executing code.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use harrier_engine::{
    Counters, CpuModel, CpuState, Engine, EngineError, Exit, Flow, GsiRoute, GuestRegion, Io, Kicker, Msi,
    Probe, Vcpu, Vm, VmConfig,
};
use harrier_machine::boot::{Boot, BytesImage, Entry};
use harrier_machine::{BuildError, Machine, MachineBuilder, MachineConfig, MachineEnd};

/// What a vCPU does, one after the other; behind the last one it spins until it is kicked.
#[derive(Clone)]
enum Action {
    Out(u16, u8),
    Return(Exit),
    Panic,
}

struct PlaybackEngine {
    scripts: Vec<Vec<Action>>,
    runs: Arc<AtomicU64>,
}

struct PlaybackVm {
    scripts: Vec<Vec<Action>>,
    runs: Arc<AtomicU64>,
}

struct PlaybackVcpu {
    script: std::vec::IntoIter<Action>,
    kick: Arc<PlaybackKicker>,
    runs: Arc<AtomicU64>,
    state: CpuState,
}

#[derive(Default)]
struct PlaybackKicker {
    kicked: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Kicker for PlaybackKicker {
    fn kick(&self) {
        let _guard = self.lock.lock().unwrap();
        self.kicked.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }
}

impl Engine for PlaybackEngine {
    fn name(&self) -> &'static str {
        "playback"
    }

    fn probe(&self) -> Probe {
        Probe::Available { detail: String::new() }
    }

    fn cpu_models(&self) -> Vec<CpuModel> {
        vec![CpuModel::V1, CpuModel::V2]
    }

    fn enforces_cpu_model(&self) -> bool {
        true
    }

    fn create_vm(&self, _config: &VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        Ok(Box::new(PlaybackVm { scripts: self.scripts.clone(), runs: Arc::clone(&self.runs) }))
    }
}

impl Vm for PlaybackVm {
    fn map_memory(&self, _region: Arc<GuestRegion>, _read_only: bool) -> Result<(), EngineError> {
        Ok(())
    }

    fn unmap_memory(&self, _gpa: u64) -> Result<(), EngineError> {
        Ok(())
    }

    fn sync_dirty_pages(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        let script = self.scripts.get(index as usize).cloned().unwrap_or_default();
        Ok(Box::new(PlaybackVcpu {
            script: script.into_iter(),
            kick: Arc::new(PlaybackKicker::default()),
            runs: Arc::clone(&self.runs),
            state: CpuState::default(),
        }))
    }

    fn send_msi(&self, _msi: Msi) -> Result<(), EngineError> {
        Ok(())
    }

    fn set_gsi_routes(&self, _routes: &[GsiRoute]) -> Result<(), EngineError> {
        Ok(())
    }

    fn clock_ns(&self) -> Result<u64, EngineError> {
        Ok(0)
    }

    fn set_clock_ns(&self, _clock_ns: u64) -> Result<(), EngineError> {
        Ok(())
    }

    fn stop_time(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn start_time(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn tsc_khz(&self) -> u32 {
        1_000_000
    }
}

impl Vcpu for PlaybackVcpu {
    fn run(&mut self, io: &mut dyn Io) -> Exit {
        self.runs.fetch_add(1, Ordering::SeqCst);
        loop {
            if self.kick.kicked.swap(false, Ordering::SeqCst) {
                return Exit::Kicked;
            }
            match self.script.next() {
                Some(Action::Out(port, value)) => {
                    if io.pio_write(port, &[value]) == Flow::Leave {
                        return Exit::Left;
                    }
                }
                Some(Action::Return(exit)) => return exit,
                Some(Action::Panic) => panic!("the engine is broken"),
                None => {
                    let guard = self.kick.lock.lock().unwrap();
                    let waiting = |_: &mut ()| !self.kick.kicked.load(Ordering::SeqCst);
                    drop(self.kick.changed.wait_while(guard, waiting).unwrap());
                }
            }
        }
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.kick) as Arc<dyn Kicker>
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.state.clone())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }

    fn counters(&self) -> Counters {
        Counters { instructions: Some(10), ..Default::default() }
    }
}

fn config(vcpu_count: u32) -> MachineConfig {
    MachineConfig { vcpu_count, memory_bytes: 4 << 20, cpu_model: CpuModel::V2 }
}

fn machine(scripts: Vec<Vec<Action>>) -> (Machine, Arc<AtomicU64>) {
    let runs = Arc::new(AtomicU64::new(0));
    let engine = PlaybackEngine { scripts, runs: Arc::clone(&runs) };
    let mut builder = MachineBuilder::new(&engine, &config(engine.scripts.len() as u32)).unwrap();
    builder.add_platform_devices().unwrap();
    builder.add_debug_exit().unwrap();
    let image = BytesImage::new("guest", &[0xf4]);
    let boot = Boot::Flat { image: &image, gpa: 0x7c00, entry: Entry::Real { cs: 0, ip: 0x7c00 } };
    (builder.build(&boot).unwrap(), runs)
}

fn end_of(scripts: Vec<Vec<Action>>) -> MachineEnd {
    let (mut machine, _) = machine(scripts);
    machine.start().unwrap();
    machine.wait().end
}

#[test]
fn each_way_of_the_guest_to_end_is_told_apart() {
    for (action, end) in [
        (Action::Out(0x600, 0x34), MachineEnd::PowerOff),
        (Action::Out(0x602, 1), MachineEnd::Reset),
        (Action::Out(0x64, 0xfe), MachineEnd::Reset),
        (Action::Out(0x505, 1), MachineEnd::GuestPanic),
        (Action::Out(0xf4, 7), MachineEnd::DebugExit(7)),
        (Action::Return(Exit::TripleFault), MachineEnd::TripleFault { vcpu: 0, rip: 0x7c00 }),
        (Action::Return(Exit::Shutdown), MachineEnd::Shutdown { vcpu: 0 }),
    ] {
        assert_eq!(end_of(vec![vec![action], vec![]]), end);
    }
    let exit = Exit::Unsupported { rip: 5, bytes: vec![0x0f], reason: "x".to_owned() };
    assert_eq!(
        end_of(vec![vec![], vec![Action::Return(exit)]]),
        MachineEnd::Unsupported { vcpu: 1, rip: 5, bytes: vec![0x0f], reason: "x".to_owned() }
    );
}

#[test]
fn a_kick_or_a_device_that_leaves_without_an_end_does_not_end_the_run() {
    let script = vec![Action::Return(Exit::Kicked), Action::Return(Exit::Left), Action::Out(0xf4, 1)];
    assert_eq!(end_of(vec![script]), MachineEnd::DebugExit(1));
}

#[test]
fn a_panic_of_the_engine_ends_the_machine_and_not_the_process() {
    let end = end_of(vec![vec![Action::Panic], vec![]]);
    assert_eq!(end, MachineEnd::Failed("vcpu 0 panicked: the engine is broken".to_owned()));
}

#[test]
fn the_owner_stops_guests_that_spin() {
    let (mut machine, _) = machine(vec![vec![], vec![], vec![]]);
    let handle = machine.handle();
    machine.start().unwrap();
    handle.stop();
    let report = machine.wait();
    assert_eq!(report.end, MachineEnd::Stopped);
    assert_eq!(report.instructions(), Some(30));
}

#[test]
fn while_paused_no_vcpu_runs_and_all_go_on_after_the_last_resume() {
    let (mut machine, runs) = machine(vec![vec![], vec![]]);
    let handle = machine.handle();
    machine.start().unwrap();
    for _ in 0..50 {
        assert!(handle.pause());
        assert!(handle.pause());
        let before = runs.load(Ordering::SeqCst);
        assert_eq!(machine.cpu_states().unwrap().len(), 2);
        handle.resume();
        assert_eq!(runs.load(Ordering::SeqCst), before);
        handle.resume();
    }
    handle.stop();
    assert!(!handle.pause());
    assert_eq!(machine.wait().end, MachineEnd::Stopped);
}

#[test]
fn dropping_a_running_machine_ends_it() {
    let (mut machine, _) = machine(vec![vec![], vec![]]);
    machine.start().unwrap();
    let handle = machine.handle();
    drop(machine);
    assert_eq!(handle.wait_for_end(None), Some(MachineEnd::Stopped));
}

#[test]
fn impossible_machines_are_refused_in_words() {
    let engine = PlaybackEngine { scripts: vec![], runs: Arc::default() };
    let text = |config: MachineConfig| match MachineBuilder::new(&engine, &config) {
        Ok(_) => String::new(),
        Err(err) => err.to_string(),
    };
    assert_eq!(text(config(0)), "0 cpus are not possible: give 1 to 255");
    assert_eq!(text(config(256)), "256 cpus are not possible: give 1 to 255");
    let v3 = text(MachineConfig { cpu_model: CpuModel::V3, ..config(1) });
    assert!(v3.starts_with("cpu model v3 is not offered by the playback engine here (it lacks "), "{v3}");
    assert!(v3.contains(" avx2 ") && !v3.contains("sse4_2") && v3.ends_with("): use one of v1, v2"), "{v3}");
    assert!(matches!(
        MachineBuilder::new(&engine, &MachineConfig { memory_bytes: 0, ..config(1) }),
        Err(BuildError::Memory(_))
    ));
}
