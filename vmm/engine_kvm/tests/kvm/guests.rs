//! Guests of a few bytes on KVM: accesses, ends, kicks, interrupts. Skipped, and saying so, without KVM.

use crate::support::{Access, CODE, DEVICE, EXIT_PORT, Machine, Recorder, engine, machine};
use harrier_engine::cpu_state::{MpState, msr};
use harrier_engine::{Exit, GsiRoute, Msi, Vcpu};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// out 0xf4, al
const LEAVE: [u8; 2] = [0xe6, 0xf4];

fn rip(vcpu: &mut dyn Vcpu) -> u64 {
    vcpu.state().unwrap().regs.rip
}

#[test]
fn real_mode_port_accesses_reach_the_devices_and_leaving_completes_the_instruction() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    // in al, 0x60; in ax, 0x62 (by dx); mov bl, al; out 0xf4, al
    machine.start_real(&[0xe4, 0x60, 0xba, 0x62, 0x00, 0xed, 0x88, 0xc3, 0xe6, 0xf4]);
    let mut io = Recorder::default();
    assert_eq!(machine.run(&mut io), Exit::Left);
    assert_eq!(io.seen, [Access::In(0x60, 1), Access::In(0x62, 2), Access::Out(EXIT_PORT, vec![0x12])]);
    let state = machine.vcpus[0].state().unwrap();
    assert_eq!(state.regs.rip, CODE + 10);
    assert_eq!(state.regs.gpr[0] & 0xffff, 0x1312);
    assert_eq!(machine.vcpus[0].counters().io_accesses, 3);
}

#[test]
fn an_in_that_leaves_has_its_result_in_the_state() {
    struct LeaveOnIn(Recorder);
    impl harrier_engine::Io for LeaveOnIn {
        fn pio_read(&mut self, port: u16, data: &mut [u8]) -> harrier_engine::Flow {
            let _ = self.0.pio_read(port, data);
            harrier_engine::Flow::Leave
        }
        fn pio_write(&mut self, port: u16, data: &[u8]) -> harrier_engine::Flow {
            self.0.pio_write(port, data)
        }
        fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> harrier_engine::Flow {
            let _ = self.0.mmio_read(gpa, data);
            harrier_engine::Flow::Leave
        }
        fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> harrier_engine::Flow {
            self.0.mmio_write(gpa, data)
        }
        fn eoi(&mut self, vector: u8) -> harrier_engine::Flow {
            self.0.eoi(vector)
        }
    }
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    // in al, 0x60; mov ebx, [DEVICE + 2]
    machine.start_protected(&[0xe4, 0x60, 0x8b, 0x1d, 2, 0, 0, 0xd0]);
    let mut io = LeaveOnIn(Recorder::default());
    assert_eq!(machine.vcpus[0].run(&mut io), Exit::Left);
    let state = machine.vcpus[0].state().unwrap();
    assert_eq!((state.regs.rip, state.regs.gpr[0]), (CODE + 2, 0x11));
    assert_eq!(machine.vcpus[0].run(&mut io), Exit::Left);
    let state = machine.vcpus[0].state().unwrap();
    assert_eq!((state.regs.rip, state.regs.gpr[3]), (CODE + 8, 0x1514_1312));
    assert_eq!(io.0.seen, [Access::In(0x60, 1), Access::Load(DEVICE + 2, 4)]);
}

#[test]
fn a_store_that_an_event_is_for_signals_it_and_the_others_come_to_the_devices() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    if !machine.vm.signal_stores(DEVICE + 0x50, 1, &event).unwrap() {
        println!("skipped: a_store_that_an_event_is_for: kvm: this host's KVM signals no stores");
        return;
    }
    // mov eax, 1; mov [DEVICE + 0x50], eax; the same again; inc eax; mov [DEVICE + 0x50], eax; out 0xf4, al
    let store = [0xa3, 0x50, 0, 0, 0xd0];
    let code = [&[0xb8, 1, 0, 0, 0][..], &store, &store, &[0x40], &store, &LEAVE].concat();
    machine.start_protected(&code);
    let mut io = Recorder::default();
    assert_eq!(machine.run(&mut io), Exit::Left);
    let store = Access::Store(DEVICE + 0x50, vec![2, 0, 0, 0]);
    assert_eq!(io.seen, [store, Access::Out(EXIT_PORT, vec![2])]);
    assert_eq!(event.read().unwrap(), 2);
    // The place is taken: it stays with who has it.
    assert!(!machine.vm.signal_stores(DEVICE + 0x50, 1, &event).unwrap());
}

#[test]
fn string_port_instructions_come_element_by_element() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    // cld; mov edi, 0x5000; mov ecx, 5; mov edx, 0x70; rep insw
    // mov esi, 0x5000; mov ecx, 5; rep outsw; out 0xf4, al
    machine.start_protected(&[
        0xfc, 0xbf, 0, 0x50, 0, 0, 0xb9, 5, 0, 0, 0, 0xba, 0x70, 0, 0, 0, 0xf3, 0x66, 0x6d, //
        0xbe, 0, 0x50, 0, 0, 0xb9, 5, 0, 0, 0, 0xf3, 0x66, 0x6f, 0xe6, 0xf4,
    ]);
    let mut io = Recorder::default();
    assert_eq!(machine.run(&mut io), Exit::Left);
    let expected: Vec<u8> = (0x11..0x1b).collect();
    assert_eq!(machine.read::<10>(0x5000), expected[..]);
    assert_eq!(io.written(0x70), expected);
    let ins: Vec<_> = io.seen.iter().filter(|access| **access == Access::In(0x70, 2)).collect();
    assert_eq!(ins.len(), 5);
}

#[test]
fn memory_accesses_without_memory_reach_the_devices_in_every_width() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    let mut code = vec![0x48, 0xc7, 0xc7]; // mov rdi, sign-extended
    code.extend((0x7000_0000u32).to_le_bytes());
    code.extend([
        0x48, 0x8d, 0x84, 0x3f, 0, 0, 0, 0, // lea rax, [rdi+rdi]: 0xe0000000
        0x48, 0x8b, 0x18, // mov rbx, [rax]
        0x48, 0x89, 0x58, 0x08, // mov [rax+8], rbx
        0x66, 0x89, 0x58, 0x10, // mov [rax+16], bx
        0x88, 0x58, 0x12, // mov [rax+18], bl
        0x0f, 0xb6, 0x48, 0x14, // movzx ecx, byte [rax+20]
    ]);
    code.extend(LEAVE);
    machine.start_long(&code);
    let mut io = Recorder::default();
    assert_eq!(machine.run(&mut io), Exit::Left);
    let all: Vec<u8> = (0x11..0x19).collect();
    let at = |offset: u64| 0xe000_0000 + offset;
    assert_eq!(
        io.seen[..5],
        [
            Access::Load(at(0), 8),
            Access::Store(at(8), all.clone()),
            Access::Store(at(16), all[..2].to_vec()),
            Access::Store(at(18), all[..1].to_vec()),
            Access::Load(at(20), 1),
        ]
    );
    assert_eq!(machine.vcpus[0].state().unwrap().regs.gpr[1], 0x19);
}

#[test]
fn msrs_are_written_and_appear_in_the_state_and_unknown_ones_fault() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    // mov ecx, 0xc0000082; mov eax, 0x12345678; xor edx, edx; wrmsr; out 0xf4, al; mov ecx, 0x1fff; rdmsr
    machine.start_long(&[
        0xb9, 0x82, 0, 0, 0xc0, 0xb8, 0x78, 0x56, 0x34, 0x12, 0x31, 0xd2, 0x0f, 0x30, 0xe6, 0xf4, //
        0xb9, 0xff, 0x1f, 0, 0, 0x0f, 0x32,
    ]);
    let mut io = Recorder::default();
    assert_eq!(machine.run(&mut io), Exit::Left);
    let state = machine.vcpus[0].state().unwrap();
    assert!(state.msrs.contains(&(msr::LSTAR, 0x1234_5678)), "{:x?}", state.msrs);
    // #GP without an IDT becomes a triple fault.
    assert_eq!(machine.run(&mut io), Exit::TripleFault);
}

#[test]
fn a_triple_fault_is_reported() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    machine.start_protected(&[0x0f, 0x0b]);
    let mut state = machine.vcpus[0].state().unwrap();
    state.segments.idtr.limit = 0;
    machine.vcpus[0].set_state(&state).unwrap();
    assert_eq!(machine.run(&mut Recorder::default()), Exit::TripleFault);
}

#[test]
fn a_kick_before_the_run_ends_it_at_once_and_only_once() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    machine.start_real(&[0x90, 0xe6, 0xf4]);
    let mut io = Recorder::default();
    machine.vcpus[0].kicker().kick();
    assert_eq!(machine.run(&mut io), Exit::Kicked);
    assert_eq!(rip(machine.vcpus[0].as_mut()), CODE);
    assert_eq!(machine.run(&mut io), Exit::Left);
}

#[test]
fn a_kick_from_another_thread_ends_a_halt_and_an_endless_loop() {
    let Some(engine) = engine() else { return };
    for (code, state) in [(&[0xf4u8, 0xeb, 0xfd][..], MpState::Halted), (&[0xeb, 0xfe], MpState::Runnable)] {
        let mut machine = machine(&engine, 1);
        machine.start_real(code);
        let kicker = machine.vcpus[0].kicker();
        let kicking = std::thread::spawn(move || {
            // Whether the guest has begun by then does not matter for the outcome, only for the way there.
            std::thread::sleep(std::time::Duration::from_millis(20));
            kicker.kick();
        });
        assert_eq!(machine.run(&mut Recorder::default()), Exit::Kicked);
        kicking.join().unwrap();
        assert_eq!(machine.vcpus[0].state().unwrap().mp_state, state);
    }
}

/// An IDT in real mode: vector `vector` at 0:`handler`.
fn real_vector(machine: &Machine, vector: u8, handler: u16) {
    machine.write(u64::from(vector) * 4, &handler.to_le_bytes());
    machine.write(u64::from(vector) * 4 + 2, &[0, 0]);
}

/// Turns the local APIC of vCPU 0 on, as software does by the spurious-interrupt register.
fn enable_lapic(vcpu: &mut dyn Vcpu) {
    let mut state = vcpu.state().unwrap();
    state.lapic.registers[0xf] = 0x1ff;
    vcpu.set_state(&state).unwrap();
}

#[test]
fn a_message_wakes_a_halted_processor_and_runs_its_handler() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    // sti; hlt; out 0xf4, al
    machine.start_real(&[0xfb, 0xf4, 0xe6, 0xf4]);
    // handler: mov al, 7; out 0x80, al; iret
    machine.write(0x3000, &[0xb0, 7, 0xe6, 0x80, 0xcf]);
    real_vector(&machine, 0x41, 0x3000);
    enable_lapic(machine.vcpus[0].as_mut());
    machine.vm.send_msi(Msi { address: 0xfee0_0000, data: 0x41 }).unwrap();
    let mut io = Recorder::default();
    assert_eq!(machine.run(&mut io), Exit::Left);
    assert_eq!(io.written(0x80), [7]);
    // Nobody is there.
    machine.vm.send_msi(Msi { address: 0xfee0_7000, data: 0x41 }).unwrap();
}

#[test]
fn the_end_of_a_level_interrupt_of_a_route_is_reported_and_of_an_edge_one_is_not() {
    let Some(engine) = engine() else { return };
    for (level, eois) in [(1 << 15 | 1 << 14, vec![0x42]), (0, vec![])] {
        let mut machine = machine(&engine, 1);
        // sti; hlt; out 0xf4, al
        machine.start_protected(&[0xfb, 0xf4, 0xe6, 0xf4]);
        // handler: mov dword [0xfee000b0], 0; out 0xf4, al (not iretd: some hosts emulate this mode without it)
        machine.write(0x3000, &[0xc7, 0x05, 0xb0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xe6, 0xf4]);
        machine.write_u64(0x6000 + 8 * 0x42, 0x0000_8e00_0008_3000);
        machine.write_u64(0x7008, 0x00cf_9b00_0000_ffff);
        machine.write_u64(0x7010, 0x00cf_9300_0000_ffff);
        let mut state = machine.vcpus[0].state().unwrap();
        state.segments.idtr = harrier_engine::cpu_state::DescriptorTable { base: 0x6000, limit: 0x7ff };
        state.segments.gdtr = harrier_engine::cpu_state::DescriptorTable { base: 0x7000, limit: 0x17 };
        machine.vcpus[0].set_state(&state).unwrap();
        enable_lapic(machine.vcpus[0].as_mut());
        let msi = Msi { address: 0xfee0_0000, data: 0x42 | level };
        machine.vm.set_gsi_routes(&[GsiRoute { gsi: 5, msi }]).unwrap();
        machine.vm.send_msi(msi).unwrap();
        let mut io = Recorder::default();
        assert_eq!(machine.run(&mut io), Exit::Left);
        let expected: Vec<_> = eois.into_iter().map(Access::Eoi).collect();
        let seen: Vec<_> = io.seen.into_iter().filter(|access| matches!(access, Access::Eoi(_))).collect();
        assert_eq!(seen, expected, "level bits {level:#x}");
    }
}

#[test]
fn a_second_processor_starts_by_init_and_start_up_messages() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 2);
    // At 0x8000, where SIPI vector 8 starts: mov al, 0x55; mov [0x5000], al; hlt
    machine.write(0x8000, &[0xb0, 0x55, 0xa2, 0x00, 0x50, 0xf4]);
    // mov eax, [wait]; send INIT and SIPI by the ICR, then wait for the byte:
    // mov dword [0xfee00310], 1<<24; mov dword [0xfee00300], 0x4500; mov dword [0xfee00300], 0x4608
    // wait: pause; cmp byte [0x5000], 0x55; jne wait; out 0xf4, al
    machine.start_protected(&[
        0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0, 0, 0, 1, //
        0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0, 0, //
        0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0, 0, //
        0xf3, 0x90, 0x80, 0x3d, 0, 0x50, 0, 0, 0x55, 0x75, 0xf5, 0xe6, 0xf4,
    ]);
    enable_lapic(machine.vcpus[0].as_mut());
    let mut second = machine.vcpus.pop().unwrap();
    assert_eq!(second.state().unwrap().mp_state, MpState::WaitForSipi);
    let kicker = second.kicker();
    let thread = std::thread::spawn(move || (second.run(&mut Recorder::default()), second));
    assert_eq!(machine.run(&mut Recorder::default()), Exit::Left);
    kicker.kick();
    let (exit, mut second) = thread.join().unwrap();
    assert_eq!(exit, Exit::Kicked);
    let state = second.state().unwrap();
    assert_eq!(state.regs.gpr[0] & 0xff, 0x55);
    assert_eq!(state.segments.cs.base, 0x8000);
}

#[test]
fn pages_that_the_guest_writes_are_marked_after_logging_began() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    // mov byte [0x20000], 1; out 0xf4, al; mov byte [0x23000], 1; out 0xf4, al
    machine
        .start_protected(&[0xc6, 0x05, 0, 0, 2, 0, 1, 0xe6, 0xf4, 0xc6, 0x05, 0, 0x30, 2, 0, 1, 0xe6, 0xf4]);
    let mut io = Recorder::default();
    assert_eq!(machine.run(&mut io), Exit::Left);
    let memory = std::sync::Arc::clone(&machine.memory);
    let mapping: &MmapRegion<harrier_engine::PageLog> = &memory;
    let pages = machine.memory.len() as usize / 4096;
    machine.vm.sync_dirty_pages().unwrap();
    assert_eq!(mapping.bitmap().dirty_pages(), pages, "nobody knows what was written before");
    mapping.bitmap().take_dirty();
    assert_eq!(machine.run(&mut io), Exit::Left);
    assert!(!mapping.bitmap().dirty_at(0x23000));
    machine.vm.sync_dirty_pages().unwrap();
    assert!(mapping.bitmap().dirty_at(0x23000));
    assert!(!mapping.bitmap().dirty_at(0x20000));
    assert_eq!(mapping.bitmap().dirty_pages(), 1);
}

#[test]
fn regions_that_overlap_or_do_not_exist_are_refused() {
    let Some(engine) = engine() else { return };
    let machine = machine(&engine, 1);
    let error = machine.vm.map_memory(std::sync::Arc::clone(&machine.memory), false).unwrap_err();
    assert!(error.to_string().contains("overlaps"), "{error}");
    assert!(machine.vm.unmap_memory(0x1000).is_err());
    machine.vm.unmap_memory(0).unwrap();
    assert!(machine.vm.create_vcpu(1).is_err());
}

#[test]
fn a_guest_whose_memory_was_taken_away_meets_devices_there() {
    let Some(engine) = engine() else { return };
    let mut machine = machine(&engine, 1);
    machine.start_protected(&[0x90]);
    machine.vm.unmap_memory(0).unwrap();
    // Fetching from a device: KVM cannot, and says so instead of ending the process.
    let exit = machine.run(&mut Recorder::default());
    assert!(matches!(exit, Exit::Unsupported { rip: CODE, .. } | Exit::TripleFault), "{exit:?}");
}
