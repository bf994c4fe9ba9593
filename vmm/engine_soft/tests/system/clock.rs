//! The paravirtual clock's pages and the time-stamp counter.

use crate::machine::*;

const PAGE: u64 = 0x7800;

/// Version, TSC, nanoseconds, multiplier, shift, flags.
fn page(machine: &Machine) -> (u32, u64, u64, u32, i8, u8) {
    let [head, tsc, ns, rest] = machine.read::<4>(PAGE);
    (head as u32, tsc, ns, rest as u32, (rest >> 32) as i8, (rest >> 40) as u8)
}

#[test]
fn the_clock_page_says_how_ticks_become_nanoseconds() {
    let machine = Machine::new(1);
    machine.vm.set_clock_ns(5_000_000_000).unwrap();
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &[&wrmsr(0x4b56_4d01, PAGE | 1)[..], LEAVE].concat());
    let (state, _) = run(&mut *vcpu);
    let (version, tsc, ns, multiplier, shift, flags) = page(&machine);
    assert!(version != 0 && version % 2 == 0);
    assert!((5_000_000_000..65_000_000_000).contains(&ns), "{ns}");
    assert_eq!((multiplier, shift, flags), (1 << 31, 1, 1), "a gigahertz, stable");
    assert!(tsc <= state.tsc.value);
    // From the page, the present is what the machine says.
    let now = ns + (vcpu.state().unwrap().tsc.value - tsc);
    assert!(machine.vm.clock_ns().unwrap().abs_diff(now) < 1_000_000_000);
}

#[test]
fn setting_the_clock_writes_the_page_again() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    machine.write(CODE, &[&wrmsr(0x4b56_4d01, PAGE | 1)[..], LEAVE, LEAVE].concat());
    run(&mut *vcpu);
    let before = page(&machine);
    machine.vm.set_clock_ns(1 << 50).unwrap();
    run(&mut *vcpu);
    let after = page(&machine);
    assert!(after.0 > before.0 && after.2 >= 1 << 50 && after.1 >= before.1);
}

#[test]
fn a_page_outside_memory_is_ignored() {
    for at in [0xffff_ffff_ffff_fffd_u64, 0x4000_0001, 0xf_fff1] {
        let machine = Machine::new(1);
        let mut vcpu = machine.long_mode(0);
        let code = [&wrmsr(0x4b56_4d01, at)[..], &wrmsr(0x4b56_4d00, at & !1), LEAVE].concat();
        machine.write(CODE, &code);
        run(&mut *vcpu);
    }
}

#[test]
fn writing_the_counter_moves_it_and_its_adjustment() {
    let machine = Machine::new(1);
    let mut vcpu = machine.long_mode(0);
    let before = vcpu.state().unwrap().tsc.value;
    machine.write(CODE, &[&wrmsr(0x10, 1 << 40)[..], LEAVE].concat());
    let (state, _) = run(&mut *vcpu);
    assert!(state.tsc.value >= 1 << 40 && state.tsc.value < (1 << 40) + (1 << 36));
    let adjust = state.msrs.iter().find(|(msr, _)| *msr == 0x3b).unwrap().1;
    assert!(adjust <= (1 << 40) - before && adjust > (1 << 40) - before - (1 << 36));
}

#[test]
fn restored_processors_count_on_from_where_they_were_and_agree() {
    let machine = Machine::new(2);
    let mut states = [0, 1].map(|index| machine.long_mode(index).state().unwrap());
    states[0].tsc.value = 1 << 45;
    states[1].tsc.value = (1 << 45) + 300_000_000;
    let restored = Machine::new(2);
    let mut vcpus = [0, 1].map(|index| restored.vm.create_vcpu(index).unwrap());
    for (vcpu, state) in vcpus.iter_mut().zip(&states) {
        vcpu.set_state(state).unwrap();
    }
    let [first, second] = vcpus.each_mut().map(|vcpu| vcpu.state().unwrap().tsc.value);
    assert!(first >= 1 << 45 && second >= first, "{first} {second}");
    let again = vcpus[0].state().unwrap().tsc.value;
    assert!(again >= second, "both count the same time: {again} {second}");
}
