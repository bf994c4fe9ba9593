//! Interrupt messages between vCPUs and from devices: who is meant, and how they get there (Intel SDM volume 3,
//! 12.6 and 12.11).
//!
//! [`Destinations`] says who answers to which destination, without locks. A message goes into the mailbox of
//! each target ([`crate::vm::Mailbox`]); the target's [`crate::lapic`] takes it from there.

use std::sync::atomic::{AtomicU64, Ordering};

use harrier_engine::Msi;
use harrier_engine::cpu_state::MpState;

use crate::cpu::{CS, Cpu};
use crate::vm::Shared;

/// Which vCPU answers to which destination: what the APICs say of themselves, readable by all threads.
pub(crate) struct Destinations {
    entries: Vec<AtomicU64>,
}

/// One APIC's part of [`Destinations`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Identity {
    /// Logical destination register, in the form of the mode.
    pub logical: u32,
    /// The APIC is not switched off in APIC_BASE.
    pub present: bool,
    /// It is switched on in the spurious-vector register.
    pub enabled: bool,
    pub x2apic: bool,
    /// Destination format register: cluster model.
    pub cluster: bool,
}

const PRESENT: u64 = 1 << 32;
const ENABLED: u64 = 1 << 33;
const X2APIC: u64 = 1 << 34;
const CLUSTER: u64 = 1 << 35;

impl Destinations {
    pub(crate) fn new(count: usize) -> Destinations {
        Destinations { entries: (0..count).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Publishes what the APIC with this id answers to.
    pub(crate) fn set(&self, id: u32, identity: Identity) {
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        if let Some(entry) = self.entries.get(id as usize) {
            entry.store(
                u64::from(identity.logical)
                    | flag(identity.present, PRESENT)
                    | flag(identity.enabled, ENABLED)
                    | flag(identity.x2apic, X2APIC)
                    | flag(identity.cluster, CLUSTER),
                Ordering::SeqCst,
            );
        }
    }

    fn get(&self, id: usize) -> Identity {
        let value = self.entries.get(id).map_or(0, |entry| entry.load(Ordering::SeqCst));
        Identity {
            logical: value as u32,
            present: value & PRESENT != 0,
            enabled: value & ENABLED != 0,
            x2apic: value & X2APIC != 0,
            cluster: value & CLUSTER != 0,
        }
    }

    /// Whether the APIC with this id is meant.
    fn matches(&self, id: usize, destination: Destination) -> bool {
        let identity = self.get(id);
        if !identity.present {
            return false;
        }
        match destination {
            Destination::Physical(wanted) => wanted as usize == id,
            Destination::Broadcast => true,
            Destination::Logical(wanted) if identity.x2apic => {
                wanted >> 16 == identity.logical >> 16 && wanted & identity.logical & 0xffff != 0
            }
            Destination::Logical(wanted) => {
                let (wanted, own) = (wanted & 0xff, identity.logical >> 24);
                if identity.cluster {
                    wanted >> 4 == own >> 4 && wanted & own & 0xf != 0
                } else {
                    wanted & own != 0
                }
            }
        }
    }
}

/// Who is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Destination {
    /// An APIC id.
    Physical(u32),
    /// Message destination address in logical mode.
    Logical(u32),
    /// Every APIC.
    Broadcast,
}

impl Destination {
    /// From the fields of a message; `all` is the broadcast number of its width.
    pub(crate) fn of(logical: bool, number: u32, all: u32) -> Destination {
        if number == all {
            Destination::Broadcast
        } else if logical {
            Destination::Logical(number)
        } else {
            Destination::Physical(number)
        }
    }
}

/// Delivery modes of interrupt messages.
mod delivery {
    pub(super) const FIXED: u32 = 0;
    pub(super) const LOWEST_PRIORITY: u32 = 1;
    pub(super) const NMI: u32 = 4;
    pub(super) const INIT: u32 = 5;
    pub(super) const START_UP: u32 = 6;
}

/// What is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Message {
    pub mode: u32,
    pub vector: u8,
    pub level: bool,
}

impl Message {
    /// From the low half of an ICR, or the data of an MSI.
    pub(crate) fn of(bits: u32) -> Message {
        Message { mode: bits >> 8 & 7, vector: bits as u8, level: bits & 1 << 15 != 0 }
    }
}

/// Vectors, one bit each.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct VectorSet([u64; 4]);

impl VectorSet {
    pub(crate) fn add(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    pub(crate) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] & 1 << (vector & 63) != 0
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..=255u8).filter(|&vector| self.contains(vector))
    }
}

/// Messages of other processors and devices that an APIC has not seen yet.
#[derive(Default, Debug)]
pub(crate) struct InterruptMail {
    pub fixed: VectorSet,
    /// Those of `fixed` that came level triggered last.
    pub level: VectorSet,
    /// NMIs, as far as it matters: the second one waits while the first is served.
    pub nmi: u8,
    pub init: bool,
    /// Start-up vector page.
    pub start_up: Option<u8>,
}

impl InterruptMail {
    fn put(&mut self, message: Message) {
        match message.mode {
            delivery::FIXED | delivery::LOWEST_PRIORITY => {
                self.fixed.add(message.vector);
                if message.level {
                    self.level.add(message.vector);
                } else {
                    self.level.0[usize::from(message.vector >> 6)] &= !(1 << (message.vector & 63));
                }
            }
            delivery::NMI => self.nmi = (self.nmi + 1).min(2),
            delivery::INIT => {
                self.init = true;
                self.start_up = None;
            }
            delivery::START_UP => {
                // The first one counts until the processor has started.
                self.start_up.get_or_insert(message.vector);
            }
            // SMI and ExtINT have nobody to serve them here.
            _ => {}
        }
    }
}

/// Sends a message-signalled interrupt to the vCPUs it names.
pub(crate) fn deliver_msi(shared: &Shared, msi: Msi) {
    if msi.address & 0xfff0_0000 != 0xfee0_0000 {
        return;
    }
    let number = (msi.address >> 12 & 0xff) as u32;
    let logical = msi.address & 1 << 2 != 0;
    // A level message tells of an assertion; the deassertion needs none.
    if msi.data & 1 << 15 != 0 && msi.data & 1 << 14 == 0 {
        return;
    }
    send(shared, Destination::of(logical, number, 0xff), Message::of(msi.data), None);
}

/// Puts a message into the mailboxes of its targets, all but `except`.
pub(crate) fn send(shared: &Shared, destination: Destination, message: Message, except: Option<u32>) {
    let meant = |id: usize| except != Some(id as u32) && shared.destinations.matches(id, destination);
    let post = |id: usize| {
        if let Some(mailbox) = shared.mailboxes.get(id) {
            mailbox.post(|mail| mail.interrupts.put(message));
        }
    };
    let count = shared.mailboxes.len();
    if message.mode == delivery::LOWEST_PRIORITY {
        // One of those that take interrupts, spread by vector.
        let able = |id: &usize| meant(*id) && shared.destinations.get(*id).enabled;
        let able_count = (0..count).filter(able).count();
        if able_count > 0
            && let Some(id) = (0..count).filter(able).nth(usize::from(message.vector) % able_count)
        {
            post(id);
        }
        return;
    }
    match destination {
        Destination::Physical(id) if meant(id as usize) => post(id as usize),
        Destination::Physical(_) => {}
        _ => (0..count).filter(|&id| meant(id)).for_each(post),
    }
}

impl Cpu {
    /// Takes interrupts, NMI, INIT and start-up messages from the mailbox.
    pub(crate) fn accept_mail(&mut self, mail: InterruptMail) {
        if mail.init {
            self.init();
        }
        for vector in mail.fixed.iter() {
            self.lapic.accept(vector, mail.level.contains(vector));
        }
        if mail.nmi > 0 {
            self.nmi_second |= self.nmi_pending && !self.nmi_masked || mail.nmi > 1;
            self.nmi_pending = true;
        }
        if let Some(page) = mail.start_up
            && self.mp_state == MpState::WaitForSipi
        {
            self.seg[CS].selector = u16::from(page) << 8;
            self.seg[CS].base = u64::from(page) << 12;
            self.rip = 0;
            self.mp_state = MpState::Runnable;
            self.mode_changed();
        }
        self.update_attention();
    }

    /// INIT: most registers as after RESET, then the bootstrap processor runs and the others wait (Intel SDM
    /// volume 3, 10.1 and 12.4.7.3).
    fn init(&mut self) {
        self.reset_registers();
        self.reset_events();
        self.lapic.reset();
        self.publish_apic();
        self.mp_state =
            if self.msrs.apic_base & 1 << 8 != 0 { MpState::Runnable } else { MpState::WaitForSipi };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three(identities: [Identity; 3]) -> Destinations {
        let destinations = Destinations::new(3);
        for (id, identity) in identities.into_iter().enumerate() {
            destinations.set(id as u32, identity);
        }
        destinations
    }

    fn targets(destinations: &Destinations, destination: Destination) -> Vec<usize> {
        (0..3).filter(|&id| destinations.matches(id, destination)).collect()
    }

    #[test]
    fn logical_destinations_follow_each_apics_model() {
        let on = Identity { present: true, enabled: true, ..Identity::default() };
        let flat = three([
            Identity { logical: 1 << 24, ..on },
            Identity { logical: 2 << 24, ..on },
            Identity { logical: 4 << 24, present: false, ..on },
        ]);
        assert_eq!(targets(&flat, Destination::Logical(7)), [0, 1]);
        assert_eq!(targets(&flat, Destination::of(false, 0xff, 0xff)), [0, 1]);
        assert_eq!(targets(&flat, Destination::Physical(2)), [0; 0], "switched off");
        let cluster = Identity { cluster: true, ..on };
        let clusters = three([
            Identity { logical: 0x11 << 24, ..cluster },
            Identity { logical: 0x12 << 24, ..cluster },
            Identity { logical: 0x21 << 24, ..cluster },
        ]);
        assert_eq!(targets(&clusters, Destination::Logical(0x13)), [0, 1]);
        assert_eq!(targets(&clusters, Destination::Logical(0x21)), [2]);
        let x2apic = Identity { x2apic: true, ..on };
        let wide = three([
            Identity { logical: 1, ..x2apic },
            Identity { logical: 2, ..x2apic },
            Identity { logical: 0x1_0001, ..x2apic },
        ]);
        assert_eq!(targets(&wide, Destination::Logical(3)), [0, 1]);
        assert_eq!(targets(&wide, Destination::Logical(0x1_0001)), [2]);
        assert_eq!(targets(&wide, Destination::of(false, u32::MAX, u32::MAX)), [0, 1, 2]);
    }

    #[test]
    fn a_later_init_takes_back_the_start_up_message() {
        let mut mail = InterruptMail::default();
        mail.put(Message { mode: delivery::START_UP, vector: 8, level: false });
        assert_eq!(mail.start_up, Some(8));
        mail.put(Message { mode: delivery::INIT, vector: 0, level: true });
        assert!(mail.init && mail.start_up.is_none());
        mail.put(Message { mode: delivery::FIXED, vector: 0xff, level: true });
        mail.put(Message { mode: delivery::FIXED, vector: 0x20, level: false });
        assert_eq!(mail.fixed.iter().collect::<Vec<_>>(), [0x20, 0xff]);
        assert!(mail.level.contains(0xff) && !mail.level.contains(0x20));
    }
}
