//! Devices that are saved in the middle of something and go on behind other registers.

use super::mmio::INTERRUPT_USED;
use super::mmio::state::VirtioState;
use super::rng::Rng;
use super::test_driver::{BUFFERS, Driver, WRITE};
use super::vsock::{NoHost, Vsock};
use super::{VirtioDevice, VirtioMmio};
use crate::state::Stateful;

/// Puts `device` in the place of the driver's, with its state as a snapshot has it.
fn hand_over(driver: &mut Driver, device: Box<dyn VirtioDevice>) -> VirtioState {
    let text = serde_json::to_string(&driver.transport.save()).unwrap();
    let state: VirtioState = serde_json::from_str(&text).unwrap();
    driver.transport = VirtioMmio::new(device, driver.mem.clone(), driver.line.clone()).unwrap();
    driver.transport.restore(state.clone()).unwrap();
    state
}

#[test]
fn a_request_whose_notification_was_lost_is_served_after_restoring() {
    let mut driver = Driver::new(Box::new(Rng::new()));
    let done = driver.offer(0, &[(BUFFERS, 10, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((done, 10)));
    let waiting = driver.offer(0, &[(BUFFERS + 0x1000, 100, WRITE)]);
    let state = hand_over(&mut driver, Box::new(Rng::new()));
    assert_eq!(driver.transport.save(), state);
    assert!(driver.line.is_high(), "the interrupt that was pending still is");
    driver.transport.process_pending();
    assert_eq!(driver.used(0), Some((waiting, 100)));
    assert_eq!(driver.interrupt(), INTERRUPT_USED);
    let next = driver.offer(0, &[(BUFFERS, 5, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((next, 5)));
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone_and_reads_its_new_context_id() {
    let vsock = |cid| Box::new(Vsock::new(cid, Box::new(NoHost)).unwrap());
    let mut driver = Driver::new(vsock(3));
    driver.write(BUFFERS, &[0xff; 8]);
    let event = driver.offer(2, &[(BUFFERS, 8, WRITE)]);
    driver.kick(2);
    assert_eq!(driver.used(2), None, "there is nothing to say in a machine that was not restored");
    hand_over(&mut driver, vsock(4));
    driver.transport.process_pending();
    assert_eq!(driver.used(2), Some((event, 4)));
    assert_eq!(driver.read(BUFFERS, 8), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(driver.get(0x100), 4);
    // Once is enough.
    driver.offer(2, &[(BUFFERS, 8, WRITE)]);
    driver.kick(2);
    assert_eq!(driver.used(2), None);
}

#[test]
fn states_that_the_device_cannot_be_in_are_refused() {
    let mut driver = Driver::new(Box::new(Rng::new()));
    let good = driver.transport.save();
    type Change = fn(&mut VirtioState);
    let changes: [(&str, Change); 6] = [
        ("type 19", |state| state.device_type = 19),
        ("not offered", |state| state.accepted |= 1 << 50),
        ("no status", |state| state.status |= 1 << 20),
        ("0 queues", |state| state.queues.clear()),
        ("queue 0", |state| state.queues[0].size = 3),
        ("queue 0", |state| state.queues[0].available = u64::MAX - 1),
    ];
    for (text, change) in changes {
        let mut state = good.clone();
        change(&mut state);
        let mut other =
            VirtioMmio::new(Box::new(Rng::new()), driver.mem.clone(), driver.line.clone()).unwrap();
        let refused = other.restore(state).unwrap_err().to_string();
        assert!(refused.contains(text), "{refused}");
    }
    hand_over(&mut driver, Box::new(Rng::new()));
}
