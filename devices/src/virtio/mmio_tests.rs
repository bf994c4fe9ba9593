//! The transport as a driver, a confused driver and a hostile one see it.

use event_manager::{EventManager, SubscriberOps};

use super::*;
use crate::interrupt::tests::RecordedLine;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::test_driver::{BUFFERS, Driver, INDIRECT, MEMORY, NEXT, WRITE, memory};

/// Copies what it may read into what it may write, and remembers what was asked of it.
#[derive(Default)]
struct Echo {
    calls: Arc<Mutex<Vec<String>>>,
}

impl Echo {
    fn note(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
    }
}

impl VirtioDevice for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8, 4]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in (offset..).zip(data) {
            *byte = if i < 16 { i as u8 } else { 0 };
        }
    }

    fn start(&mut self, features: u64) {
        self.note(format!("start {features:#x}"));
    }

    fn reset(&mut self) {
        self.note("reset");
    }

    fn process_queue(&mut self, queue: usize, running: Running<'_>) -> Result<Progress, QueueError> {
        self.note(format!("queue {queue}"));
        let ring: &mut DeviceQueue = &mut running.queues[queue];
        while let Some(mut chain) = ring.pop(running.mem)? {
            let mut bytes = vec![0; chain.readable.len()];
            chain.readable.read(&mut bytes);
            let written = chain.writable.write(&bytes);
            ring.complete(running.mem, chain.head(), written)?;
        }
        Ok(Progress::Done)
    }
}

fn calls(driver: &Arc<Mutex<Vec<String>>>) -> Vec<String> {
    std::mem::take(&mut driver.lock().unwrap())
}

fn echo() -> (Box<Echo>, Arc<Mutex<Vec<String>>>) {
    let device = Box::<Echo>::default();
    let calls = device.calls.clone();
    (device, calls)
}

#[test]
fn a_driver_finds_what_the_specification_promises() {
    let mut driver = Driver::cold(echo().0);
    assert_eq!([0x0, 0x4, 0x8].map(|register| driver.get(register)), [0x7472_6976, 2, 42]);
    driver.set(0x14, 0);
    assert_eq!(driver.get(0x10), 0b101 | 1 << 28 | 1 << 29);
    driver.set(0x14, 1);
    assert_eq!(driver.get(0x10), 1);
    driver.set(0x14, 2);
    assert_eq!(driver.get(0x10), 0);
    for (queue, size) in [(0, 8), (1, 4), (2, 0), (u32::MAX, 0)] {
        driver.set(0x30, queue);
        assert_eq!((driver.get(0x34), driver.get(0x44)), (size, 0));
    }
    assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|register| driver.get(register)), [u32::MAX; 4]);
}

#[test]
fn requests_are_served_with_and_without_event_index_and_indirect_descriptors() {
    for without in [0, FEATURE_EVENT_IDX, FEATURE_INDIRECT | FEATURE_EVENT_IDX] {
        let mut driver = Driver::without(echo().0, without);
        for round in 0..40u8 {
            driver.write(BUFFERS, &[round; 6]);
            let queue = usize::from(round % 2);
            let chain = [
                (BUFFERS, 2, 0),
                (BUFFERS + 2, 4, 0),
                (BUFFERS + 0x100, 1, WRITE),
                (BUFFERS + 0x200, 9, WRITE),
            ];
            let head = driver.offer(queue, &chain);
            driver.kick(queue);
            assert_eq!(driver.used(queue), Some((head, 6)));
            assert_eq!(driver.read(BUFFERS + 0x200, 6), [round, round, round, round, round, 0]);
            assert!(driver.line.is_high());
            assert_eq!(driver.interrupt(), INTERRUPT_USED);
            assert!(!driver.line.is_high());
        }
    }
}

#[test]
fn the_steps_of_initialisation_cannot_be_skipped_or_taken_back() {
    let (device, log) = echo();
    let mut driver = Driver::cold(device);
    for wrong in [2, 4, 8, 0xe] {
        driver.set(0x70, wrong);
        assert_eq!(driver.status(), 0, "{wrong}");
    }
    driver.set(0x70, 1);
    driver.set(0x70, 1 | 8);
    assert_eq!(driver.status(), 1);
    driver.set(0x70, 3);
    driver.set(0x70, 1);
    assert_eq!(driver.status(), 3);
    // Without VERSION_1, or with a bit that was not offered.
    driver.set(0x70, 3 | 8);
    assert_eq!(driver.status(), 3);
    driver.set(0x24, 1);
    driver.set(0x20, 1);
    driver.set(0x24, 0);
    driver.set(0x20, 0b10);
    driver.set(0x70, 3 | 8);
    assert_eq!(driver.status(), 3);
    driver.set(0x20, 0b100);
    driver.set(0x70, 3 | 8);
    assert_eq!(driver.status(), 11);
    // Too late.
    driver.set(0x20, 0);
    assert!(calls(&log).is_empty());
    driver.set(0x70, 15);
    assert_eq!(calls(&log), ["start 0x100000004"]);
    driver.set(0x70, 15 | status::NEEDS_RESET);
    assert_eq!(driver.status(), 15);
    driver.set(0x70, 0);
    assert_eq!((driver.status(), calls(&log)), (0, vec!["reset".to_owned()]));
}

#[test]
fn all_steps_may_be_taken_in_one_write_but_not_without_features() {
    let (device, log) = echo();
    let mut driver = Driver::cold(device);
    driver.set(0x70, 15);
    assert_eq!(driver.status(), 3);
    assert!(calls(&log).is_empty());
}

#[test]
fn queues_are_set_up_between_features_and_driver_ok_only() {
    let mut driver = Driver::cold(echo().0);
    driver.set(0x80, 0x1000);
    driver.set(0x44, 1);
    assert_eq!(driver.get(0x44), 0);
    driver.bring_up(0);
    driver.set(0x38, 2);
    driver.set(0x44, 1);
    assert_eq!(driver.get(0x44), 0, "no queue 2 is selected");
    driver.set(0x30, 0);
    assert_eq!(driver.get(0x44), 1);
    driver.set(0x44, 0);
    assert_eq!(driver.get(0x44), 0);
    driver.set(0x44, 1);
    assert_eq!(driver.get(0x44), 0);
}

#[test]
fn bad_sizes_and_addresses_leave_a_queue_unready() {
    let end = MEMORY as u64;
    let good = (8, 0x10_0000, 0x10_1000, 0x10_2000);
    for (size, descriptors, available, used) in [
        (0, good.1, good.2, good.3),
        (3, good.1, good.2, good.3),
        (16, good.1, good.2, good.3),
        (0x1_0008, good.1, good.2, good.3),
        (u32::MAX, good.1, good.2, good.3),
        (8, good.1 + 8, good.2, good.3),
        (8, good.1, good.2 + 1, good.3),
        (8, good.1, good.2, good.3 + 2),
        (8, end - 127, good.2, good.3),
        (8, end - 112, good.2, good.3),
        (8, good.1, end - 20, good.3),
        (8, good.1, good.2, end - 64),
        (8, !15, good.2, good.3),
        (8, 1 << 63, good.2, good.3),
        (8, good.1, !1, good.3),
        (8, good.1, good.2, !3),
        (8, 0, good.2, good.3),
        (8, good.1, 0, good.3),
        (8, good.1, good.2, 0),
    ] {
        let mut driver = Driver::cold(echo().0);
        for value in [1, 3] {
            driver.set(0x70, value);
        }
        driver.set(0x24, 1);
        driver.set(0x20, 1);
        driver.set(0x70, 11);
        let mut try_with = |size, descriptors: u64, available: u64, used: u64| {
            driver.set(0x38, size);
            for (register, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
                driver.set(register, address as u32);
                driver.set(register + 4, (address >> 32) as u32);
            }
            driver.set(0x44, 1);
            driver.get(0x44)
        };
        assert_eq!(
            try_with(size, descriptors, available, used),
            0,
            "{size} {descriptors:#x} {available:#x} {used:#x}"
        );
        assert_eq!(try_with(good.0, good.1, good.2, good.3), 1);
    }
}

/// Runs a broken request and expects the device to ask for a reset, and to work again after one.
fn expect_needs_reset(what: &str, break_it: impl FnOnce(&mut Driver)) {
    let mut driver = Driver::new(echo().0);
    break_it(&mut driver);
    driver.kick(0);
    assert!(driver.needs_reset(), "{what}");
    assert_eq!(driver.interrupt() & INTERRUPT_CONFIG, INTERRUPT_CONFIG, "{what}");
    while driver.used(0).is_some() {}
    driver.offer(0, &[(BUFFERS, 8, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), None, "{what}: it must not go on");
    driver.bring_up(0);
    let head = driver.offer(0, &[(BUFFERS, 8, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((head, 0)), "{what}: it must work after a reset");
}

#[test]
fn hostile_rings_and_chains_end_in_needs_reset() {
    let end = MEMORY as u64;
    expect_needs_reset("a loop", |driver| {
        let table = driver.rings[0].descriptors;
        driver.describe(table, 0, (BUFFERS, 8, NEXT, 1));
        driver.describe(table, 1, (BUFFERS, 8, NEXT, 0));
        driver.publish(0, 0);
    });
    expect_needs_reset("a successor that does not exist", |driver| {
        let table = driver.rings[0].descriptors;
        driver.describe(table, 0, (BUFFERS, 8, NEXT, 8));
        driver.publish(0, 0);
    });
    expect_needs_reset("a head that does not exist", |driver| driver.publish(0, 8));
    expect_needs_reset("a head far out", |driver| driver.publish(0, u16::MAX));
    expect_needs_reset("more available than the queue holds", |driver| {
        let available = driver.rings[0].available;
        driver.write(available + 2, &9u16.to_le_bytes());
    });
    for (address, len) in
        [(end - 4, 8), (end, 1), (u64::MAX, 1), (u64::MAX - 3, 8), (0, u32::MAX), (1 << 40, 1)]
    {
        expect_needs_reset("a buffer outside memory", |driver| {
            driver.offer(0, &[(address, len, 0)]);
        });
    }
    expect_needs_reset("readable after writable", |driver| {
        driver.offer(0, &[(BUFFERS, 8, WRITE), (BUFFERS, 8, 0)]);
    });
    expect_needs_reset("an indirect table with a part of an entry", |driver| {
        driver.offer(0, &[(BUFFERS, 17, INDIRECT)]);
    });
    expect_needs_reset("an empty indirect table", |driver| {
        driver.offer(0, &[(BUFFERS, 0, INDIRECT)]);
    });
    expect_needs_reset("an indirect table outside memory", |driver| {
        driver.offer(0, &[(end, 16, INDIRECT)]);
    });
    expect_needs_reset("an indirect table within an indirect table", |driver| {
        driver.describe(BUFFERS, 0, (BUFFERS, 16, INDIRECT, 0));
        driver.offer(0, &[(BUFFERS, 16, INDIRECT)]);
    });
    expect_needs_reset("an indirect chain longer than the queue", |driver| {
        for index in 0..9 {
            driver.describe(BUFFERS, index, (BUFFERS, 1, if index < 8 { NEXT } else { 0 }, index + 1));
        }
        driver.offer(0, &[(BUFFERS, 9 * 16, INDIRECT)]);
    });
    expect_needs_reset("an indirect loop", |driver| {
        driver.describe(BUFFERS, 0, (BUFFERS, 1, NEXT, 0));
        driver.offer(0, &[(BUFFERS, 16, INDIRECT)]);
    });
    expect_needs_reset("more than 4 GiB in one chain", |driver| {
        let chain: Vec<_> = (0..7).map(|_| (0, MEMORY as u32, 0)).collect();
        driver.offer(0, &chain);
        let table = driver.rings[0].descriptors;
        driver.describe(table, 6, (0, u32::MAX, 0, 0));
    });
}

#[test]
fn an_indirect_chain_is_served() {
    let mut driver = Driver::new(echo().0);
    driver.write(BUFFERS + 0x1000, b"through the table");
    driver.describe(BUFFERS, 0, (BUFFERS + 0x1000, 17, NEXT, 2));
    driver.describe(BUFFERS, 2, (BUFFERS + 0x2000, 100, WRITE, 0));
    let head = driver.offer(0, &[(BUFFERS, 48, INDIRECT)]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((head, 17)));
    assert_eq!(driver.read(BUFFERS + 0x2000, 17), b"through the table");
}

#[test]
fn buffers_of_no_length_are_passed_over() {
    let mut driver = Driver::new(echo().0);
    driver.write(BUFFERS, b"ab");
    let head = driver.offer(0, &[(u64::MAX, 0, 0), (BUFFERS, 2, 0), (0, 0, WRITE), (BUFFERS + 16, 2, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((head, 2)));
}

#[test]
fn notifications_before_driver_ok_are_not_lost_and_do_nothing_early() {
    let (device, log) = echo();
    let mut driver = Driver::cold(device);
    driver.kick(0);
    driver.kick(77);
    assert!(calls(&log).is_empty());
    driver.bring_up(0);
    calls(&log);
    driver.transport.process_pending();
    assert_eq!(calls(&log), ["queue 0", "queue 1"]);
    driver.kick(2);
    driver.kick(usize::MAX);
    assert!(calls(&log).is_empty());
}

#[test]
fn interrupts_that_the_driver_does_not_want_are_spared() {
    let mut driver = Driver::without(echo().0, FEATURE_EVENT_IDX);
    let available = driver.rings[0].available;
    driver.write(available, &1u16.to_le_bytes());
    driver.offer(0, &[(BUFFERS, 8, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.interrupt(), 0);
    driver.write(available, &0u16.to_le_bytes());
    driver.offer(0, &[(BUFFERS, 8, WRITE)]);
    driver.kick(0);
    assert_eq!(driver.interrupt(), INTERRUPT_USED);
}

#[test]
fn what_is_not_acknowledged_rises_again_for_an_edge_triggered_pin() {
    let mut driver = Driver::new(echo().0);
    driver.transport.shared.interrupt.raise(INTERRUPT_USED | INTERRUPT_CONFIG);
    let before = driver.line.rises();
    driver.set(0x64, INTERRUPT_USED);
    assert_eq!((driver.get(0x60), driver.line.rises()), (INTERRUPT_CONFIG, before + 1));
    driver.set(0x70, 0);
    assert_eq!((driver.get(0x60), driver.line.is_high()), (0, false));
}

#[test]
fn configuration_is_read_at_any_width_and_past_its_end() {
    let mut driver = Driver::new(echo().0);
    for width in [1, 2, 4, 8] {
        let mut data = [0xff; 8];
        let _ = driver.transport.read(0x103, &mut data[..width]);
        assert_eq!(data[..width], [3, 4, 5, 6, 7, 8, 9, 10][..width]);
        let _ = driver.transport.read(0xff8, &mut data[..width]);
        assert_eq!(data[..width], [0; 8][..width]);
        let _ = driver.transport.write(0x100, &data[..width]);
    }
}

#[test]
fn registers_answer_only_to_aligned_words() {
    let mut driver = Driver::new(echo().0);
    for (offset, width) in [(0x70, 1), (0x70, 2), (0x70, 8), (0x72, 4), (0x71, 1), (0x60, 8)] {
        let mut data = vec![0xff; width];
        let _ = driver.transport.read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0), "{offset:#x} {width}");
        let _ = driver.transport.write(offset, &data);
    }
    assert_eq!(driver.status(), 0xf);
}

#[test]
fn an_event_loop_serves_notifications() {
    let mut driver = Driver::new(echo().0);
    let mut manager = EventManager::<Box<dyn MutEventSubscriber + Send>>::new().unwrap();
    manager.add_subscriber(driver.transport.events());
    manager.run_with_timeout(0).unwrap();
    let head = driver.offer(1, &[(BUFFERS, 8, WRITE)]);
    driver.set(0x50, 1);
    assert_eq!(manager.run_with_timeout(0).unwrap(), 1);
    assert_eq!(driver.used(1), Some((head, 0)));
    assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
}

#[test]
fn random_accesses_of_any_kind_are_survived() {
    let mut x = 5u64;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        x >> 16
    };
    let line = Arc::new(RecordedLine::default());
    let mem = memory();
    let mut transport = VirtioMmio::new(echo().0, mem, line).unwrap();
    for _ in 0..200_000 {
        let offset = match next() % 4 {
            0 => next() % 0x1000,
            1 => 0x70,
            _ => next() % 0x40 * 4,
        };
        let width = 1 << (if next() % 8 == 0 { next() % 4 } else { 2 });
        let value = match next() % 4 {
            0 => next(),
            1 => next() % 16,
            2 => 1 << (next() % 32),
            _ => (next() % (MEMORY as u64)) & !0xfff,
        };
        let mut data = value.to_le_bytes();
        if next() % 3 == 0 {
            let _ = transport.read(offset, &mut data[..width]);
        } else {
            let _ = transport.write(offset, &data[..width]);
        }
        transport.process_pending();
    }
}
