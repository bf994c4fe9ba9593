//! Interrupts: the local APIC's registers, priorities, timers in all modes, interprocessor interrupts to oneself, NMI,
//! shadows, HLT, the I/O APIC, first in xAPIC and then in x2APIC form.

#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use harrier_bare_metal::apic::{self, MASKED};
use harrier_bare_metal::cpu::{self, flags, inb, msr, outb};
use harrier_bare_metal::trap::{Block, count, set_handler, vector};
use harrier_bare_metal::{Frame, check, check_true, code, guest_main, run, skip, tcg_lacks};

guest_main!(main);

const LOW: u32 = 0x41;
const MIDDLE: u32 = 0x61;
const HIGH: u32 = 0x81;
const TIMER: u32 = 0x91;
const SERIAL: u32 = 0x51;
/// Long enough for anything, in spins of a waiting loop.
const PATIENCE: u64 = 200_000_000;

fn main() {
    cpu::cli();
    registers();
    apic::enable();
    for n in [LOW, MIDDLE, HIGH, TIMER] {
        set_handler(n.into(), Some(note_and_end));
    }
    every_form("xapic");
    io_apic();
    if apic::enable_x2apic() {
        x2apic_registers();
        every_form("x2apic");
        leave_x2apic();
    } else {
        skip("x2apic", "the processor has none");
    }
}

static ORDER: [AtomicU32; 16] = [const { AtomicU32::new(0) }; 16];
static ARRIVED: AtomicU32 = AtomicU32::new(0);
/// The vector whose in-service bit was set when the last handler ran.
static IN_SERVICE: AtomicU64 = AtomicU64::new(0);

/// Notes which vector came, and ends the interrupt.
unsafe extern "C" fn note_and_end(frame: &mut Frame, _: &mut Block) {
    let n = ARRIVED.fetch_add(1, Ordering::SeqCst) as usize;
    if let Some(place) = ORDER.get(n) {
        place.store(frame.vector as u32, Ordering::SeqCst);
    }
    IN_SERVICE.store(u64::from(apic::bit(apic::ISR, frame.vector as u32)), Ordering::SeqCst);
    apic::eoi();
}

/// Notes which vector came, and leaves it in service.
unsafe extern "C" fn note_only(frame: &mut Frame, _: &mut Block) {
    let n = ARRIVED.fetch_add(1, Ordering::SeqCst) as usize;
    if let Some(place) = ORDER.get(n) {
        place.store(frame.vector as u32, Ordering::SeqCst);
    }
}

fn forget() {
    ARRIVED.store(0, Ordering::SeqCst);
    for place in &ORDER {
        place.store(0, Ordering::SeqCst);
    }
}

/// The last eight arrivals, a byte each, the first one highest.
fn order() -> u64 {
    let n = ARRIVED.load(Ordering::SeqCst).min(8) as usize;
    ORDER[..n].iter().fold(0, |sum, place| sum << 8 | u64::from(place.load(Ordering::SeqCst)))
}

/// Lets pending interrupts in.
fn let_in() {
    cpu::sti();
    for _ in 0..100 {
        cpu::pause();
    }
    cpu::cli();
}

/// Waits with interrupts enabled until `n` have arrived.
fn wait_for(n: u32) -> bool {
    cpu::sti();
    let mut spins = 0;
    while ARRIVED.load(Ordering::SeqCst) < n && spins < PATIENCE {
        cpu::pause();
        spins += 1;
    }
    cpu::cli();
    ARRIVED.load(Ordering::SeqCst) >= n
}

fn self_ipi(n: u32) {
    apic::send_ipi(0, 0x4_0000 | n);
}

fn registers() {
    let base = cpu::rdmsr(msr::APIC_BASE);
    check("APIC base: address, enabled, bootstrap processor", base & !0x400, apic::LAPIC | 0x900);
    check("the APIC id is 0", apic::read(apic::ID).into(), 0);
    let version = apic::read(apic::VERSION);
    check_true("the version is an integrated APIC's", (0x10..0x20).contains(&(version & 0xff)));
    check_true("there are at least five local vectors", version >> 16 & 0xff >= 4);
    check("the timer is masked after reset", u64::from(apic::read(apic::LVT_TIMER) & MASKED), MASKED.into());
    check("the destination format is flat after reset", apic::read(apic::DFR).into(), 0xffff_ffff);
}

fn every_form(form: &str) {
    harrier_bare_metal::comment(format_args!("{form}"));
    priorities();
    shadows();
    non_maskable();
    timers();
    deadline();
    halting();
    logical();
}

fn priorities() {
    forget();
    self_ipi(LOW);
    check_true("a pending interrupt shows in IRR", apic::bit(apic::IRR, LOW));
    check("and does not arrive while disabled", order(), 0);
    let_in();
    check("it arrives when enabled", order(), LOW.into());
    check("it was in service then", IN_SERVICE.load(Ordering::SeqCst), 1);
    check_true("IRR is clear again", !apic::bit(apic::IRR, LOW));
    check_true("ISR is clear after the end", !apic::bit(apic::ISR, LOW));
    forget();
    self_ipi(LOW);
    self_ipi(HIGH);
    self_ipi(MIDDLE);
    self_ipi(HIGH);
    let_in();
    check("the highest comes first, and each once", order(), 0x81_6141);
    forget();
    apic::write(apic::TPR, 0x60);
    check("the processor priority follows the task priority", apic::read(apic::PPR).into(), 0x60);
    check("CR8 shows the task priority", cpu::cr8(), 6);
    self_ipi(LOW);
    self_ipi(MIDDLE);
    self_ipi(HIGH);
    let_in();
    check("the task priority holds back its own class and below", order(), HIGH.into());
    cpu::set_cr8(5);
    check("a write of CR8 reaches the APIC", apic::read(apic::TPR).into(), 0x50);
    let_in();
    check("lower task priority lets the next in", order(), 0x8161);
    apic::write(apic::TPR, 0);
    let_in();
    check("none lets all in", order(), 0x81_6141);
    forget();
    set_handler(MIDDLE.into(), Some(note_only));
    self_ipi(MIDDLE);
    let_in();
    check_true("without an end it stays in service", apic::bit(apic::ISR, MIDDLE));
    check("the processor priority is its class", u64::from(apic::read(apic::PPR) & 0xf0), 0x60);
    self_ipi(LOW);
    self_ipi(MIDDLE);
    let_in();
    check("equal and lower ones wait", order(), MIDDLE.into());
    self_ipi(HIGH);
    let_in();
    check("a higher one comes in between", order(), 0x6181);
    apic::eoi();
    let_in();
    check("after the end the next of the same comes", order(), 0x61_8161);
    apic::eoi();
    let_in();
    check("and then the lower", order(), 0x6181_6141);
    set_handler(MIDDLE.into(), Some(note_and_end));
    // A disabled APIC takes nothing.
    let arrived = count(HIGH.into());
    apic::write(apic::SPIV, 0xef);
    self_ipi(HIGH);
    let_in();
    check("a software-disabled APIC takes no fixed interrupt", u64::from(count(HIGH.into()) - arrived), 0);
    apic::enable();
}

fn shadows() {
    set_handler(LOW.into(), None);
    let pend = || self_ipi(LOW);
    let end_interrupt = || apic::eoi();
    pend();
    let sti = code!("sti", "nop", "nop", "int 0xff");
    let end = run(Frame::kernel(sti));
    check(
        "sti takes effect after the next instruction",
        end.vector << 32 | (end.rip - sti),
        u64::from(LOW) << 32 | 2,
    );
    check("the saved flags have interrupts enabled", end.rflags & flags::IF, flags::IF);
    end_interrupt();
    pend();
    let end = run(Frame::kernel(code!("sti", "cli", "nop", "int 0xff")));
    check("sti and cli let nothing in", end.vector, vector::END);
    let end = run(Frame { rflags: 2 | flags::IF, ..Frame::kernel(sti) });
    check("iretq that enables lets it in at once", end.vector << 32 | (end.rip - sti), u64::from(LOW) << 32);
    end_interrupt();
    pend();
    let popf = code!("push 0x202", "popfq", "nop", "int 0xff");
    let end = run(Frame::kernel(popf));
    check(
        "popf that enables lets it in at once",
        end.vector << 32 | (end.rip - popf),
        u64::from(LOW) << 32 | 6,
    );
    end_interrupt();
    pend();
    let mov_ss = code!("push 0x202", "mov eax, 0x10", "popfq", "mov ss, eax", "nop", "int 0xff");
    let end = run(Frame::kernel(mov_ss));
    check("popf before mov ss lets it in before", end.rip - mov_ss, 11);
    end_interrupt();
    pend();
    let sti_ss = code!("mov eax, 0x10", "sti", "mov ss, eax", "nop", "nop", "int 0xff");
    let end = run(Frame::kernel(sti_ss));
    // The architecture promises a shadow for the first of several such instructions only.
    check_true("sti and mov ss: not before mov ss", end.rip - sti_ss >= 8);
    end_interrupt();
    pend();
    let halt = code!("sti", "hlt", "int 0xff");
    let end = run(Frame::kernel(halt));
    check(
        "sti and hlt: hlt wakes with what is pending",
        end.vector << 32 | (end.rip - halt),
        u64::from(LOW) << 32 | 2,
    );
    end_interrupt();
    set_handler(LOW.into(), Some(note_and_end));
}

static NESTED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn on_nmi(_: &mut Frame, _: &mut Block) {
    let first = ARRIVED.fetch_add(1, Ordering::SeqCst) == 0;
    if first {
        apic::send_ipi(0, 0x400);
        for _ in 0..100 {
            cpu::pause();
        }
        NESTED.store(ARRIVED.load(Ordering::SeqCst), Ordering::SeqCst);
    }
}

fn non_maskable() {
    forget();
    set_handler(vector::NMI, Some(on_nmi));
    apic::send_ipi(0, 0x400);
    for _ in 0..1000 {
        cpu::pause();
    }
    check("an NMI arrives with interrupts disabled", u64::from(ARRIVED.load(Ordering::SeqCst) > 0), 1);
    check("a second one waits for iret", NESTED.load(Ordering::SeqCst).into(), 1);
    check("and comes then", ARRIVED.load(Ordering::SeqCst).into(), 2);
    set_handler(vector::NMI, None);
    // A loop that sends itself the NMI first.
    let wait = if apic::is_x2apic() {
        code!("mov ecx, 0x830", "xor edx, edx", "mov eax, 0x400", "wrmsr", "2: pause", "jmp 2b")
    } else {
        code!("mov dword ptr [rsi + 0x310], 0", "mov dword ptr [rsi + 0x300], 0x400", "2: pause", "jmp 2b")
    };
    let end = run(Frame { rsi: apic::LAPIC, ..Frame::kernel(wait) });
    check("an NMI ends an endless loop with interrupts disabled", end.vector, vector::NMI);
}

fn timers() {
    apic::write(apic::TIMER_DIVIDE, 0b1011);
    apic::write(apic::LVT_TIMER, TIMER);
    forget();
    apic::write(apic::TIMER_INITIAL, 100_000);
    check_true("a one-shot timer fires", wait_for(1));
    check("with its vector", order(), TIMER.into());
    check("the count is zero then", apic::read(apic::TIMER_CURRENT).into(), 0);
    cpu::sti();
    for _ in 0..200_000 {
        cpu::pause();
    }
    cpu::cli();
    check("it fires once", ARRIVED.load(Ordering::SeqCst).into(), 1);
    apic::write(apic::TIMER_INITIAL, 0xffff_fff0);
    let first = apic::read(apic::TIMER_CURRENT);
    let mut spins = 0;
    while apic::read(apic::TIMER_CURRENT) == first && spins < 1_000_000 {
        spins += 1;
    }
    let later = apic::read(apic::TIMER_CURRENT);
    check_true("the count goes down", later < first && later != 0);
    apic::write(apic::TIMER_INITIAL, 0);
    check("an initial count of zero stops it", apic::read(apic::TIMER_CURRENT).into(), 0);
    check("the initial count reads back", apic::read(apic::TIMER_INITIAL).into(), 0);
    forget();
    apic::write(apic::LVT_TIMER, TIMER | 1 << 17);
    apic::write(apic::TIMER_INITIAL, 200_000);
    check_true("a periodic timer fires again and again", wait_for(4));
    check_true("and its count is within the period", apic::read(apic::TIMER_CURRENT) <= 200_000);
    apic::write(apic::LVT_TIMER, TIMER | 1 << 17 | MASKED);
    forget();
    cpu::sti();
    for _ in 0..200_000 {
        cpu::pause();
    }
    cpu::cli();
    check("a masked timer does not", u64::from(ARRIVED.load(Ordering::SeqCst) <= 1), 1);
    apic::write(apic::TIMER_INITIAL, 0);
    // Dividers: the same count takes longer with a larger divider.
    apic::write(apic::LVT_TIMER, TIMER | MASKED);
    let ticks = |divider: u32| {
        apic::write(apic::TIMER_DIVIDE, divider);
        apic::write(apic::TIMER_INITIAL, u32::MAX);
        let start = cpu::rdtsc();
        while cpu::rdtsc() - start < 4_000_000 {}
        u64::from(u32::MAX - apic::read(apic::TIMER_CURRENT))
    };
    // Whoever runs the machine may stand still between two looks at a clock, but not every time.
    let slower = (0..20).any(|_| {
        let (by_1, by_16) = (ticks(0b1011), ticks(0b0011));
        by_16 > 0 && by_1 > by_16 * 2
    });
    check_true("dividing by 16 counts more slowly", slower);
    apic::write(apic::TIMER_INITIAL, 0);
    apic::write(apic::TIMER_DIVIDE, 0b1011);
    let_in();
}

fn deadline() {
    if cpu::cpuid(1, 0).ecx & 1 << 24 == 0 {
        skip("tsc deadline", "the processor has none");
        return;
    }
    forget();
    apic::write(apic::LVT_TIMER, TIMER | 2 << 17);
    cpu::wrmsr(msr::TSC_DEADLINE, cpu::rdtsc() + 2_000_000);
    check_true(
        "a deadline is armed",
        cpu::rdmsr(msr::TSC_DEADLINE) != 0 || ARRIVED.load(Ordering::SeqCst) != 0,
    );
    check_true("a deadline fires", wait_for(1));
    check("and is disarmed then", cpu::rdmsr(msr::TSC_DEADLINE), 0);
    forget();
    let start = cpu::rdtsc();
    cpu::wrmsr(msr::TSC_DEADLINE, start + 3_000_000);
    wait_for(1);
    check_true("not before its time", cpu::rdtsc() >= start + 3_000_000);
    forget();
    cpu::wrmsr(msr::TSC_DEADLINE, 1);
    check_true("a deadline in the past fires at once", wait_for(1));
    forget();
    cpu::wrmsr(msr::TSC_DEADLINE, cpu::rdtsc() + 2_000_000);
    cpu::wrmsr(msr::TSC_DEADLINE, 0);
    let start = cpu::rdtsc();
    cpu::sti();
    while cpu::rdtsc() - start < 6_000_000 {
        cpu::pause();
    }
    cpu::cli();
    check("zero disarms", ARRIVED.load(Ordering::SeqCst).into(), 0);
    apic::write(apic::LVT_TIMER, TIMER);
    cpu::wrmsr(msr::TSC_DEADLINE, cpu::rdtsc() + 1000);
    check("a deadline means nothing in the other modes", cpu::rdmsr(msr::TSC_DEADLINE), 0);
    apic::write(apic::LVT_TIMER, MASKED);
}

fn halting() {
    apic::write(apic::LVT_TIMER, TIMER);
    forget();
    apic::write(apic::TIMER_INITIAL, 1_000_000);
    let mut wakes = 0;
    while ARRIVED.load(Ordering::SeqCst) == 0 && wakes < 10 {
        cpu::wait_for_interrupt();
        wakes += 1;
    }
    check("hlt waits for the timer", order(), TIMER.into());
    forget();
    for _ in 0..20 {
        apic::write(apic::TIMER_INITIAL, 20_000);
        let before = ARRIVED.load(Ordering::SeqCst);
        while ARRIVED.load(Ordering::SeqCst) == before {
            cpu::wait_for_interrupt();
        }
    }
    check("hlt misses no timer", ARRIVED.load(Ordering::SeqCst).into(), 20);
    apic::write(apic::LVT_TIMER, MASKED);
}

fn logical() {
    forget();
    apic::send_ipi(0, HIGH);
    let_in();
    check("physical destination", order(), HIGH.into());
    forget();
    apic::send_ipi(77, HIGH);
    let_in();
    check("physical destination of nobody", order(), 0);
    apic::send_ipi(0, 0x8_0000 | HIGH);
    let_in();
    check("to all including oneself", order(), HIGH.into());
    forget();
    apic::send_ipi(0, 0xc_0000 | HIGH);
    let_in();
    check("to all but oneself", order(), 0);
    if apic::is_x2apic() {
        check("the logical id in x2apic form", apic::read(apic::LDR).into(), 1);
        apic::send_ipi(1, 1 << 11 | HIGH);
    } else {
        apic::write(apic::LDR, 0x0200_0000);
        apic::send_ipi(3, 1 << 11 | HIGH);
    }
    let_in();
    check("logical destination", order(), HIGH.into());
    forget();
    apic::send_ipi(4, 1 << 11 | HIGH);
    let_in();
    check("logical destination of nobody", order(), 0);
}

fn io_apic() {
    const COM1: u16 = 0x3f8;
    let quiet = || {
        outb(COM1 + 1, 0);
        inb(COM1 + 2);
        apic::ioapic_route(4, 0, MASKED);
        let_in();
        forget();
    };
    // Every printed byte raises the interrupt again: results are collected first and printed afterwards.
    set_handler(SERIAL.into(), Some(note_and_end));
    outb(COM1 + 4, 0x08);
    quiet();
    apic::ioapic_route(4, 0, SERIAL);
    outb(COM1 + 1, 2);
    let arrived = wait_for(1);
    let (came, cause) = (order(), inb(COM1 + 2) & 0x0f);
    quiet();
    check_true("the serial port's interrupt arrives", arrived);
    check("with its vector", came, SERIAL.into());
    check("and its cause", cause.into(), 2);

    quiet();
    apic::ioapic_route(4, 0, SERIAL | MASKED);
    outb(COM1 + 1, 2);
    let_in();
    let came = order();
    quiet();
    check("a masked pin sends nothing", came, 0);

    // Level: it comes again until the cause is gone.
    set_handler(SERIAL.into(), Some(note_only));
    quiet();
    apic::ioapic_route(4, 0, SERIAL | 1 << 15);
    outb(COM1 + 1, 2);
    let first = wait_for(1);
    let remote = apic::ioapic_read(0x18) >> 14 & 1;
    let level = apic::bit(apic::TMR, SERIAL);
    let_in();
    let once = order();
    apic::eoi();
    let again = wait_for(2);
    inb(COM1 + 2);
    apic::eoi();
    let_in();
    let (came, cleared) = (order(), apic::ioapic_read(0x18) >> 14 & 1);
    quiet();
    check_true("a level interrupt arrives", first);
    check("remote IRR is set", remote.into(), 1);
    check_true("the trigger mode register says level", level);
    check("it does not come again before its end", once, SERIAL.into());
    check_true("after its end it comes again, as the line is still high", again);
    check("after the cause is gone it does not", came, 0x5151);
    check("remote IRR is clear", cleared.into(), 0);

    // A processor that is halted.
    set_handler(SERIAL.into(), Some(note_and_end));
    quiet();
    apic::ioapic_route(4, 0, SERIAL);
    outb(COM1 + 1, 2);
    if ARRIVED.load(Ordering::SeqCst) == 0 {
        cpu::wait_for_interrupt();
    }
    let came = order();
    quiet();
    check("a device wakes a halted processor", came, SERIAL.into());
}

fn x2apic_registers() {
    check("APIC base says x2APIC", cpu::rdmsr(msr::APIC_BASE) & 0xc00, 0xc00);
    check("the id has 32 bits", cpu::rdmsr(0x802), 0);
    check("the id is cpuid's", cpu::cpuid(0xb, 0).edx.into(), cpu::rdmsr(0x802));
    let read = |index: u64| run(Frame { rcx: index, ..Frame::kernel(code!("rdmsr", "int 0xff")) }).vector;
    let write = |index: u64, value: u64| {
        run(Frame {
            rcx: index,
            rax: value & 0xffff_ffff,
            rdx: value >> 32,
            ..Frame::kernel(code!("wrmsr", "int 0xff"))
        })
        .vector
    };
    check("there is no destination format register", read(0x80e), vector::GP);
    check("there is no second command register", read(0x831), vector::GP);
    check("reserved registers fault", read(0x801), vector::GP);
    check("the end register cannot be read", read(0x80b), vector::GP);
    check("the id cannot be written", write(0x802, 0), vector::GP);
    check("the end register takes only zero", write(0x80b, 1), vector::GP);
    check("the error register takes only zero", write(0x828, 1), vector::GP);
    check("reserved bits of the task priority fault", write(0x808, 0x100), vector::GP);
    check("the upper half must be zero", write(0x80f, 1 << 32 | 0x1ff), vector::GP);
    check(
        "x2APIC and disabled at once is not possible",
        write(msr::APIC_BASE.into(), cpu::rdmsr(msr::APIC_BASE) & !0x800),
        vector::GP,
    );
    check(
        "back to xAPIC directly is not possible",
        write(msr::APIC_BASE.into(), cpu::rdmsr(msr::APIC_BASE) & !0x400),
        vector::GP,
    );
    check(
        "the command register reads back",
        {
            cpu::wrmsr(0x830, 5 << 32 | 0x4_0000 | u64::from(LOW));
            cpu::rdmsr(0x830)
        },
        5 << 32 | 0x4_0000 | u64::from(LOW),
    );
    let_in();
    forget();
    cpu::wrmsr(0x83f, MIDDLE.into());
    let_in();
    check("the self-IPI register", order(), MIDDLE.into());
}

fn leave_x2apic() {
    cpu::wrmsr(msr::APIC_BASE, cpu::rdmsr(msr::APIC_BASE) & !0xc00);
    check("a disabled APIC is not in cpuid", u64::from(cpu::cpuid(1, 0).edx >> 9 & 1), 0);
    cpu::wrmsr(msr::APIC_BASE, cpu::rdmsr(msr::APIC_BASE) | 0x800);
    check("an enabled one is", u64::from(cpu::cpuid(1, 0).edx >> 9 & 1), 1);
    check("it is software-disabled after that", u64::from(apic::read(apic::SPIV) >> 8 & 1), 0);
    apic::enable();
    forget();
    self_ipi(HIGH);
    let_in();
    check("and works as xAPIC again", order(), HIGH.into());
    if !tcg_lacks("x2APIC registers fault in xAPIC form") {
        let end = run(Frame { rcx: 0x802, ..Frame::kernel(code!("rdmsr", "int 0xff")) });
        check("x2APIC registers fault in xAPIC form", end.vector, vector::GP);
    }
}
