//! Puts a machine together: [`MachineBuilder`] takes devices one by one and is consumed by
//! [`MachineBuilder::build`], which boots a kernel, or by [`MachineBuilder::restore`], which takes up a snapshot.
//!
//! A device is what it claims on the buses, its ACPI object, its event-loop subscriber, its interrupt line and its state;
//! nothing here or later asks what kind it is.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use harrier_devices::acpi_pm::{self, AcpiPm};
use harrier_devices::bus::ClaimError;
use harrier_devices::byte_output::{ByteOutput, DEFAULT_CAPACITY};
use harrier_devices::debug_exit::{self, DebugExit};
use harrier_devices::doorbell::{self, Doorbell, DoorbellConfig};
use harrier_devices::i8042::{self, I8042};
use harrier_devices::ioapic::{self, IoApic};
use harrier_devices::pvpanic::{self, PvPanic};
use harrier_devices::rtc::{self, Rtc};
use harrier_devices::serial::{self, Serial};
use harrier_devices::serial_input::SerialInput;
use harrier_devices::virtio::mmio::{QUEUE_NOTIFY, TransportError};
use harrier_devices::virtio::{VirtioDevice, VirtioMmio};
use harrier_devices::{BusBuilder, BusDevice, InterruptLine, MsiSink, PowerSink, StateUnit, Stateful, state};
use harrier_engine::cpuid::{FEATURES, Features};
use harrier_engine::{CpuModel, Engine, EngineError, GsiRoute, GuestMemory, Msi, Probe, Vcpu, Vm, VmConfig};
use harrier_hypercall_abi::calls::{
    DEVICE_DOORBELL, DEVICE_POWER, DEVICE_PVPANIC, DEVICE_SERIAL, DEVICE_VIRTIO_MMIO,
};
use harrier_hypercall_abi::port;
use vm_memory::GuestMemoryError;

use crate::acpi::{self, TablesTooLarge};
use crate::boot::{self, Boot, Entry, KernelError};
use crate::cpu_words::kernel_words;
use crate::event_loop::Subscriber;
use crate::generation_id::GenerationId;
use crate::guest_time::{DoorbellTime, GuestTime};
use crate::hypercalls::{ConsoleCalls, DeviceList, GuestClock, HypercallLog, Lives, MachineCalls, ParkTimer};
use crate::layout::{
    COM1_GSI, DOORBELL_GSI, GENERATION_ID_GSI, POWER_BUTTON_GSI, SHARED_PAGE, VIRTIO_GSIS, VIRTIO_MMIO_LEN,
    VIRTIO_MMIO_START,
};
use crate::machine::{Machine, Parts};
use crate::memory::{GuestRam, MemoryError};
use crate::mp_table;
use crate::run_control::RunControl;
use crate::snapshot::{Identity, Written};
use crate::vcpu::MachineIo;

/// Most vCPUs of a machine: their APIC ids fit a byte, and 255 means all.
pub const MAX_VCPUS: u32 = 255;
/// Most virtio devices of a machine: each has an interrupt of its own.
pub const MAX_VIRTIO_DEVICES: usize = VIRTIO_GSIS.len();

/// What every machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// Number of processors, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// The processor that the guest sees.
    pub cpu_model: CpuModel,
}

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No or too many processors.
    #[error("{0} cpus are not possible: give 1 to {MAX_VCPUS}")]
    VcpuCount(u32),
    /// The engine does not offer the model.
    #[error(
        "cpu model {model} is not offered by the {engine} engine here{}: use one of {}",
        lacking(*.model, .offered), list(.offered)
    )]
    CpuModel {
        /// What was asked for.
        model: CpuModel,
        /// The engine.
        engine: &'static str,
        /// What it offers.
        offered: Vec<CpuModel>,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The engine's answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Two devices at one address.
    #[error("device addresses: {0}")]
    Claim(#[from] ClaimError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] TablesTooLarge),
    /// The MP table.
    #[error("the MP table does not fit into guest memory ({0}): give more memory")]
    MpTable(#[from] GuestMemoryError),
    /// The kernel or what goes with it.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Too many virtio devices.
    #[error("more than {MAX_VIRTIO_DEVICES} virtio devices are not possible: use fewer disks")]
    TooManyDevices,
    /// A virtio device's registers or queues.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The host refused a device something.
    #[error("{device}: the host refused ({source}): raise the limits of threads and open files")]
    Device {
        /// The device.
        device: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

fn list(models: &[CpuModel]) -> String {
    let names: Vec<String> = models.iter().map(ToString::to_string).collect();
    names.join(", ")
}

/// The features of `model` that none of those offered has.
fn lacking(model: CpuModel, offered: &[CpuModel]) -> String {
    let best = offered.iter().filter(|model| **model != CpuModel::Host).max();
    let there = best.map_or_else(Features::default, |best| Features::of(*best));
    let missing: Vec<&str> = FEATURES
        .iter()
        .filter(|row| Features::of(model).has(row.feature) && !there.has(row.feature))
        .map(|row| row.name)
        .collect();
    if missing.is_empty() { String::new() } else { format!(" (it lacks {})", missing.join(" ")) }
}

/// Takes the I/O APIC's messages to the engine.
struct EngineMsiSink {
    vm: Arc<dyn Vm>,
}

impl MsiSink for EngineMsiSink {
    fn send_msi(&self, msi: Msi) {
        if let Err(err) = self.vm.send_msi(msi) {
            log::warn!("interrupt message {msi:x?} is lost: {err}");
        }
    }

    fn set_gsi_routes(&self, routes: &[GsiRoute]) {
        if let Err(err) = self.vm.set_gsi_routes(routes) {
            log::warn!("interrupt routes: {err}");
        }
    }
}

/// A machine in the making.
pub struct MachineBuilder {
    config: MachineConfig,
    engine: &'static str,
    cpu_model_enforced: bool,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) ram: GuestRam,
    pub(crate) vcpus: Vec<Box<dyn Vcpu>>,
    pub(crate) units: Vec<Arc<dyn StateUnit>>,
    /// What hypercalls show of guest time.
    guest_time: Option<(Arc<GuestClock>, ParkTimer)>,
    /// What is said to the guest about its lives, before the machine and after.
    pub(crate) lives: Arc<Lives>,
    pub(crate) generation_id: Option<GenerationId>,
    doorbell: Option<Arc<Mutex<Doorbell>>>,
    pio: BusBuilder,
    mmio: BusBuilder,
    ioapic: IoApic,
    acpi_objects: Vec<Vec<u8>>,
    subscribers: Vec<Subscriber>,
    attachments: Vec<Box<dyn Send>>,
    control: Arc<RunControl>,
    virtio_count: usize,
    /// The queue of the serial port, which CONSOLE calls share.
    console: Option<ConsoleCalls>,
    doorbell_events: doorbell::Events,
    /// What DEVICE calls tell of.
    devices: DeviceList,
    hypercalls: HypercallLog,
}

impl MachineBuilder {
    /// Creates memory, virtual machine, processors and interrupt controller.
    ///
    /// # Errors
    /// [`BuildError`] if the configuration is impossible on this engine or host.
    pub fn new(engine: &dyn Engine, config: &MachineConfig) -> Result<Self, BuildError> {
        Self::with_memory(engine, config, None, || GuestRam::new(config.memory_bytes))
    }

    /// As [`MachineBuilder::new`], with memory from elsewhere and the TSC of another machine.
    pub(crate) fn with_memory(
        engine: &dyn Engine,
        config: &MachineConfig,
        tsc_khz: Option<u32>,
        memory: impl FnOnce() -> Result<GuestRam, MemoryError>,
    ) -> Result<Self, BuildError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpu_count) {
            return Err(BuildError::VcpuCount(config.vcpu_count));
        }
        if let Probe::Unavailable { reason } = engine.probe() {
            return Err(EngineError::Unavailable { engine: engine.name(), reason }.into());
        }
        let offered = engine.cpu_models();
        if !offered.contains(&config.cpu_model) {
            return Err(BuildError::CpuModel { model: config.cpu_model, engine: engine.name(), offered });
        }
        let ram = memory()?;
        let vm: Arc<dyn Vm> = Arc::from(engine.create_vm(&VmConfig {
            cpu_model: config.cpu_model,
            vcpu_count: config.vcpu_count,
            tsc_khz,
        })?);
        for region in &ram.regions {
            vm.map_memory(Arc::clone(region), false)?;
        }
        let vcpus: Vec<_> =
            (0..config.vcpu_count).map(|index| vm.create_vcpu(index)).collect::<Result<_, _>>()?;
        let kickers = vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
        let control = Arc::new(RunControl::paused(GuestTime::new(Arc::clone(&vm)), kickers));
        let ioapic = IoApic::new(Arc::new(EngineMsiSink { vm: Arc::clone(&vm) }));
        let mut mmio = BusBuilder::new();
        mmio.insert(ioapic::BASE, ioapic::SIZE, Arc::new(Mutex::new(ioapic.clone())))?;
        let doorbell_events = doorbell::Events::new(ioapic.line(DOORBELL_GSI));
        Ok(MachineBuilder {
            config: config.clone(),
            engine: engine.name(),
            cpu_model_enforced: engine.enforces_cpu_model(),
            units: Vec::new(),
            guest_time: None,
            lives: Arc::new(Lives::new(doorbell_events.clone())),
            generation_id: None,
            doorbell: None,
            vm,
            ram,
            vcpus,
            pio: BusBuilder::new(),
            mmio,
            ioapic,
            acpi_objects: Vec::new(),
            subscribers: Vec::new(),
            attachments: Vec::new(),
            control,
            virtio_count: 0,
            console: None,
            doorbell_events,
            devices: DeviceList::default(),
            hypercalls: HypercallLog::default(),
        })
    }

    /// Guest memory, for devices and loaders.
    pub fn memory(&self) -> &GuestMemory {
        &self.ram.memory
    }

    /// Where devices ask for power-off and reset.
    pub fn power_sink(&self) -> Arc<dyn PowerSink> {
        Arc::clone(&self.control) as Arc<dyn PowerSink>
    }

    /// An input of the interrupt controller.
    pub fn interrupt_line(&self, gsi: u32) -> Arc<dyn InterruptLine> {
        self.ioapic.line(gsi)
    }

    /// Puts a device at `len` ports from `port` on.
    ///
    /// # Errors
    /// [`BuildError::Claim`] if another device is there.
    pub fn add_at_ports<D: BusDevice + Stateful + 'static>(
        &mut self,
        port: u16,
        len: u64,
        device: D,
    ) -> Result<(), BuildError> {
        let device = Arc::new(Mutex::new(device));
        self.units.push(state::unit(D::NAME, &device));
        Ok(self.pio.insert(port.into(), len, device)?)
    }

    /// Puts a test device without state at `len` ports from `port` on, in a machine that is never saved.
    ///
    /// # Errors
    /// [`BuildError::Claim`] if another device is there.
    pub fn add_test_ports(
        &mut self,
        port: u16,
        len: u64,
        device: impl BusDevice + 'static,
    ) -> Result<(), BuildError> {
        Ok(self.pio.insert(port.into(), len, Arc::new(Mutex::new(device)))?)
    }

    /// The same at `len` guest physical addresses from `gpa` on.
    ///
    /// # Errors
    /// [`BuildError::Claim`] if another device is there.
    pub fn add_test_memory(
        &mut self,
        gpa: u64,
        len: u64,
        device: impl BusDevice + 'static,
    ) -> Result<(), BuildError> {
        Ok(self.mmio.insert(gpa, len, Arc::new(Mutex::new(device)))?)
    }

    /// Adds a namespace object for a device (see [`crate::acpi`]).
    pub fn add_acpi_object(&mut self, object: Vec<u8>) {
        self.acpi_objects.push(object);
    }

    /// Adds a part of a device that waits for descriptors.
    pub fn add_subscriber(&mut self, subscriber: Subscriber) {
        self.subscribers.push(subscriber);
    }

    /// Adds what every PC-like machine has: keyboard controller for reset, clock, power registers, pvpanic.
    ///
    /// # Errors
    /// [`BuildError::Claim`] if another device is there.
    pub fn add_platform_devices(&mut self) -> Result<(), BuildError> {
        let power = self.power_sink();
        self.add_at_ports(i8042::PORT, i8042::SIZE, I8042::new(Arc::clone(&power)))?;
        self.add_at_ports(acpi_pm::PORT, acpi_pm::SIZE, AcpiPm::new(Arc::clone(&power)))?;
        self.add_at_ports(rtc::PORT, rtc::SIZE, Rtc::new())?;
        self.add_acpi_object(acpi::rtc_object());
        self.add_at_ports(pvpanic::PORT, pvpanic::SIZE, PvPanic::new(power))?;
        self.add_acpi_object(acpi::pvpanic_object());
        self.devices.add(DEVICE_POWER, acpi_pm::PORT.into(), acpi_pm::SIZE, None);
        self.devices.add(DEVICE_PVPANIC, pvpanic::PORT.into(), pvpanic::SIZE, None);
        self.add_acpi_object(acpi::power_button_objects());
        let line = self.interrupt_line(GENERATION_ID_GSI);
        self.generation_id = Some(GenerationId::new(self.ram.memory.clone(), line));
        self.add_acpi_object(acpi::generation_id_objects());
        Ok(())
    }

    /// Adds the port with which bare-metal test guests end.
    ///
    /// # Errors
    /// [`BuildError::Claim`] if another device is there.
    pub fn add_debug_exit(&mut self) -> Result<(), BuildError> {
        let power = self.power_sink();
        self.add_at_ports(debug_exit::DEFAULT_PORT, debug_exit::SIZE, DebugExit::new(power))
    }

    /// Adds the first serial port. What the guest prints goes to `output`, from a thread of its own; what it
    /// reads comes from `input`.
    ///
    /// # Errors
    /// [`BuildError`] if the host refuses threads or descriptors.
    pub fn add_serial(
        &mut self,
        output: Box<dyn Write + Send>,
        input: Option<OwnedFd>,
    ) -> Result<(), BuildError> {
        let refused = |source| BuildError::Device { device: "serial port", source };
        let bytes = ByteOutput::new(DEFAULT_CAPACITY);
        let serial = Serial::new(self.interrupt_line(COM1_GSI), bytes.clone()).map_err(refused)?;
        let serial = Arc::new(Mutex::new(serial));
        let told = Arc::clone(&serial);
        let console = ConsoleCalls::new(bytes.clone(), self.doorbell_events.clone());
        self.console = Some(console.clone());
        let on_room = move || {
            told.lock().unwrap_or_else(PoisonError::into_inner).output_has_room();
            console.has_room();
        };
        let writer = bytes.start_writer(output, Box::new(on_room)).map_err(refused)?;
        self.attachments.push(Box::new(writer));
        if let Some(source) = input {
            self.add_subscriber(Box::new(SerialInput::new(Arc::clone(&serial), source)));
        }
        self.units.push(state::unit(Serial::NAME, &serial));
        self.pio.insert(serial::COM1_PORT.into(), serial::SIZE, serial)?;
        self.add_acpi_object(acpi::serial_object());
        let base = serial::COM1_PORT.into();
        self.devices.add(DEVICE_SERIAL, base, serial::SIZE, Some(COM1_GSI));
        Ok(())
    }

    /// Adds the doorbell, through which the guest's kernel makes hypercalls. A serial port that was added before
    /// gives CONSOLE its place to write to.
    ///
    /// # Errors
    /// [`BuildError`] if another device is there or the host refuses a timer.
    pub fn add_doorbell(&mut self) -> Result<(), BuildError> {
        let vm = Arc::clone(&self.vm);
        let park = ParkTimer::new(move |msi| vm.send_msi(msi))
            .map_err(|source| BuildError::Device { device: "doorbell", source })?;
        self.add_subscriber(park.subscriber());
        let memory = self.ram.memory.clone();
        let clock = Arc::new(GuestClock::new(Arc::clone(&self.vm), memory.clone(), SHARED_PAGE));
        self.guest_time = Some((Arc::clone(&clock), park.clone()));
        let calls = MachineCalls {
            console: self.console.clone(),
            clock: Arc::clone(&clock),
            park,
            ram: self.ram.clone(),
            control: Arc::clone(&self.control),
            log: self.hypercalls.clone(),
            lives: Arc::clone(&self.lives),
            devices: self.devices.clone(),
        };
        let config = DoorbellConfig { shared_page_gpa: SHARED_PAGE, gsi: DOORBELL_GSI };
        let device = Doorbell::new(config, memory, self.doorbell_events.clone(), Box::new(calls));
        let device = Arc::new(Mutex::new(device));
        self.doorbell = Some(Arc::clone(&device));
        self.units.push(state::unit(Doorbell::NAME, &device));
        self.pio.insert(port::BASE.into(), port::LEN.into(), device)?;
        self.add_acpi_object(acpi::doorbell_object());
        self.devices.add(DEVICE_DOORBELL, port::BASE.into(), port::LEN.into(), Some(DOORBELL_GSI));
        Ok(())
    }

    /// Puts a virtio device behind registers and an interrupt of its own.
    ///
    /// # Errors
    /// [`BuildError`] if there are too many, or the host refuses descriptors.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), BuildError> {
        let gsi = *VIRTIO_GSIS.get(self.virtio_count).ok_or(BuildError::TooManyDevices)?;
        let index = u32::try_from(self.virtio_count).unwrap_or(u32::MAX);
        self.virtio_count += 1;
        let gpa = VIRTIO_MMIO_START + index * VIRTIO_MMIO_LEN;
        let transport = VirtioMmio::new(device, self.ram.memory.clone(), self.interrupt_line(gsi))?;
        self.subscribers.push(transport.events());
        let notify = u64::from(gpa) + QUEUE_NOTIFY;
        for (queue, event) in (0..).zip(transport.notifications()) {
            self.vm.signal_stores(notify, queue, event)?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.units.push(state::unit(&format!("virtio-{index}"), &transport));
        self.mmio.insert(gpa.into(), VIRTIO_MMIO_LEN.into(), transport)?;
        self.add_acpi_object(acpi::virtio_mmio_object(index, gpa, VIRTIO_MMIO_LEN, gsi));
        self.devices.add(DEVICE_VIRTIO_MMIO, gpa.into(), VIRTIO_MMIO_LEN.into(), Some(gsi));
        Ok(())
    }

    /// Loads `boot` and finishes the machine; its processors stand at their first instruction.
    ///
    /// # Errors
    /// [`BuildError`] if the kernel or what goes with it cannot be booted.
    pub fn build(mut self, boot: &Boot<'_>) -> Result<Machine, BuildError> {
        let vcpu_count = u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX);
        let entry = self.load(boot)?;
        // A flat image may want the place of the tables for itself.
        if matches!(boot, Boot::Kernel { .. }) {
            acpi::write_tables(vcpu_count, &self.acpi_objects, &self.ram.memory)?;
            if let Some(id) = &self.generation_id {
                id.renew().map_err(|source| BuildError::Device { device: "generation id", source })?;
            }
            mp_table::write(vcpu_count, self.virtio_count, &self.ram.memory)?;
        }
        if let Some(boot_processor) = self.vcpus.first_mut() {
            let mut state = boot_processor.state()?;
            entry.apply(&mut state, &self.ram.memory)?;
            boot_processor.set_state(&state)?;
        }
        // Setting a state sets the time-stamp counter a little late: all or none, or they would not agree.
        for other in self.vcpus.iter_mut().skip(1) {
            let state = other.state()?;
            other.set_state(&state)?;
        }
        let boot_tsc_khz = self.vm.tsc_khz();
        Ok(self.finish(boot_tsc_khz, Written::since_boot(), Identity::default()))
    }

    fn load(&self, boot: &Boot<'_>) -> Result<Entry, KernelError> {
        match *boot {
            Boot::Kernel { kernel, initrd, command_line, elf_entry }
                if !self.cpu_model_enforced && boot::is_linux(kernel)? =>
            {
                let words = kernel_words(&self.config);
                // In front: what follows `--` is the first program's.
                let command_line = &format!("{words} {command_line}");
                boot::load(&Boot::Kernel { kernel, initrd, command_line, elf_entry }, &self.ram)
            }
            _ => boot::load(boot, &self.ram),
        }
    }

    /// The interrupt controller comes last: its pins follow from the lines that the devices drive.
    pub(crate) fn all_units(&self) -> Vec<Arc<dyn StateUnit>> {
        let mut units = self.units.clone();
        units.push(state::unit(IoApic::NAME, &Arc::new(Mutex::new(self.ioapic.clone()))));
        units
    }

    pub(crate) fn finish(self, boot_tsc_khz: u32, written: Written, identity: Identity) -> Machine {
        let units = self.all_units();
        let power_button = self.ioapic.line(POWER_BUTTON_GSI);
        let vcpus: Vec<_> = self.vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        if let (Some((clock, park)), Some(first)) = (self.guest_time, vcpus.first()) {
            let (clock, boot_processor) = (Arc::downgrade(&clock), Arc::downgrade(first));
            let events = self.doorbell_events.clone();
            self.control.add_doorbell_time(DoorbellTime { clock, park, events, boot_processor });
        }
        Machine {
            parts: Arc::new(Parts {
                config: self.config,
                engine: self.engine,
                cpu_model_enforced: self.cpu_model_enforced,
                vm: self.vm,
                ram: self.ram,
                vcpus,
                units,
                boot_tsc_khz,
                identity,
                written: Mutex::new(written),
                lives: self.lives,
                doorbell: self.doorbell,
            }),
            generation_id: self.generation_id,
            io: MachineIo { pio: self.pio.build(), mmio: self.mmio.build(), ioapic: self.ioapic },
            control: self.control,
            subscribers: self.subscribers,
            threads: Vec::new(),
            event_loop: None,
            attachments: self.attachments,
            hypercalls: self.hypercalls,
            doorbell_events: self.doorbell_events,
            power_button,
            on_thread_start: Arc::new(|_| Ok(())),
        }
    }
}
