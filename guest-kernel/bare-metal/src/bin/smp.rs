//! Two processors: starting the second, interrupts between them, atomic updates, memory order, translations and code that
//! the other one changes.

#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use harrier_bare_metal::apic;
use harrier_bare_metal::boot::Shared;
use harrier_bare_metal::cpu;
use harrier_bare_metal::paging::{TEST_BASE, entry, frame, map, peek, poke, poke_bytes};
use harrier_bare_metal::smp::{self, delay, give, join, wait_until};
use harrier_bare_metal::trap::{Block, set_handler, vector};
use harrier_bare_metal::{Frame, check, check_true, code, comment, guest_main, run, tcg_lacks};

guest_main!(main);

const IPI: u32 = 0x41;
const SHOOTDOWN: u32 = 0x51;

fn main() {
    apic::enable();
    start();
    interrupts();
    atomics();
    order();
    translations();
    code_changes();
    halting_and_reset();
}

fn start() {
    comment(format_args!("{} processors", smp::expected()));
    check("no processor starts by itself", smp::starts().into(), 0);
    check_true("all others start", smp::start_all());
    check("CR0 after INIT", u64::from(smp::first_cr0() & !0x6000_0000), 0x10);
    check(
        "CR0 after INIT keeps the cache bits",
        u64::from(smp::first_cr0() & 0x6000_0000 == 0x6000_0000 || smp::first_cr0() & 0x6000_0000 == 0),
        1,
    );
    let mut ids = 0u64;
    for number in 0..smp::expected() {
        ids |= 1 << if number == 0 { apic::read(apic::ID) >> 24 } else { smp::apic_id(number) };
    }
    check("each has an APIC id of its own", ids, (1 << smp::expected()) - 1);
    let before = smp::starts();
    apic::send_ipi(0, 0xc_4600 | smp::START_PAGE);
    delay(3_000_000);
    check("a start-up message to a running processor does nothing", (smp::starts() - before).into(), 0);
    give(1, || BSP_BIT.store(cpu::rdmsr(cpu::msr::APIC_BASE), Ordering::SeqCst));
    join(1);
    check("the second is no bootstrap processor", BSP_BIT.load(Ordering::SeqCst) & 0x900, 0x800);
}

static BSP_BIT: AtomicU64 = AtomicU64::new(0);
static GOT: [AtomicU32; 8] = [const { AtomicU32::new(0) }; 8];
static STOP: AtomicBool = AtomicBool::new(false);

unsafe extern "C" fn count_ipi(_: &mut Frame, block: &mut Block) {
    GOT[block.number as usize].fetch_add(1, Ordering::SeqCst);
    apic::eoi();
}

fn got(number: usize) -> u32 {
    GOT[number].load(Ordering::SeqCst)
}

/// Runs with interrupts enabled until told to stop.
fn idle() {
    cpu::sti();
    while !STOP.load(Ordering::SeqCst) {
        cpu::pause();
    }
    cpu::cli();
}

fn idle_halted() {
    while !STOP.load(Ordering::SeqCst) {
        cpu::wait_for_interrupt();
    }
}

fn interrupts() {
    set_handler(IPI.into(), Some(count_ipi));
    let id = smp::apic_id(1);
    STOP.store(false, Ordering::SeqCst);
    give(1, idle);
    apic::send_ipi(id, IPI);
    check_true("an interrupt to the second processor", wait_until(|| got(1) == 1));
    check("the first got none", got(0).into(), 0);
    apic::send_ipi(0, 0xc_0000 | IPI);
    check_true("to all but oneself", wait_until(|| got(1) == 2));
    apic::send_ipi(0, 0x8_0000 | IPI);
    check_true("to all", wait_until(|| got(1) == 3));
    cpu::sti();
    check_true("and to oneself", wait_until(|| got(0) == 1));
    cpu::cli();
    STOP.store(true, Ordering::SeqCst);
    join(1);
    give(1, || apic::send_ipi(0, IPI));
    cpu::sti();
    check_true("from the second to the first", wait_until(|| got(0) == 2));
    cpu::cli();
    join(1);
    // A thousand round trips to a halted processor: none may be lost.
    STOP.store(false, Ordering::SeqCst);
    GOT[1].store(0, Ordering::SeqCst);
    give(1, idle_halted);
    let mut lost = 0;
    repeat(1000, |n| {
        apic::send_ipi(id, IPI);
        lost += u64::from(!wait_until(|| got(1) == n));
    });
    check("a halted processor misses no interrupt", lost, 0);
    STOP.store(true, Ordering::SeqCst);
    apic::send_ipi(id, IPI);
    check_true("and comes back", join(1));
    // Lowest priority goes to exactly one.
    GOT[0].store(0, Ordering::SeqCst);
    GOT[1].store(0, Ordering::SeqCst);
    STOP.store(false, Ordering::SeqCst);
    give(1, idle);
    cpu::sti();
    for n in 1..=10 {
        apic::send_ipi(0, 0x8_0000 | IPI);
        wait_until(|| got(0) + got(1) == 2 * n);
    }
    cpu::cli();
    check("ten to all are twenty", (got(0) + got(1)).into(), 20);
    STOP.store(true, Ordering::SeqCst);
    join(1);
}

const ROUNDS: u64 = 20_000;

/// Both processors run `job` at the same time.
fn both(job: fn()) {
    MEETING.store(0, Ordering::SeqCst);
    give(1, job);
    job();
    join(1);
}

static MEETING: AtomicU32 = AtomicU32::new(0);

/// Waits until both have come here.
fn meet() {
    let arrived = MEETING.fetch_add(1, Ordering::SeqCst) + 1;
    let all = arrived.next_multiple_of(2);
    while MEETING.load(Ordering::SeqCst) < all {
        cpu::pause();
    }
}

/// Time-stamp ticks after which a test that needs both processors at once has done enough: where they share one host
/// processor with others, every meeting costs a time slice.
const BUDGET: u64 = 400_000_000;
const LEAST_ROUNDS: u64 = 20;
static ENOUGH: AtomicBool = AtomicBool::new(false);

/// On both processors: meets and runs `body`, up to `most` times, fewer when it takes long. Rounds count from 1.
fn rounds(most: u64, body: impl Fn(u64)) {
    if !other() {
        ENOUGH.store(false, Ordering::SeqCst);
    }
    let start = cpu::rdtsc();
    for n in 1..=most {
        if !other() && n > LEAST_ROUNDS && cpu::rdtsc() - start > BUDGET {
            ENOUGH.store(true, Ordering::SeqCst);
        }
        meet();
        if ENOUGH.load(Ordering::SeqCst) {
            break;
        }
        body(n);
    }
}

/// On one processor: runs `body` up to `most` times, fewer when it takes long.
fn repeat(most: u32, mut body: impl FnMut(u32)) {
    let start = cpu::rdtsc();
    for n in 1..=most {
        if u64::from(n) > LEAST_ROUNDS && cpu::rdtsc() - start > BUDGET {
            break;
        }
        body(n);
    }
}

fn other() -> bool {
    harrier_bare_metal::trap::this_cpu().number == 1
}

#[repr(C, align(64))]
struct Line([u64; 8]);
static COUNTERS: Shared<Line> = Shared::new(Line([0; 8]));

fn cell(n: u64) -> u64 {
    COUNTERS.get() as u64 + n * 8
}

fn atomics() {
    for n in 0..8 {
        poke(cell(n), 0);
    }
    both(|| {
        meet();
        unsafe {
            asm!(
                "2:",
                "lock inc qword ptr [{at}]",
                "mov eax, 1", "lock xadd dword ptr [{at} + 8], eax",
                "lock add byte ptr [{at} + 16], 3",
                "lock sub word ptr [{at} + 18], 1",
                "3: mov rax, [{at} + 24]", "lea rdx, [rax + 1]", "lock cmpxchg [{at} + 24], rdx", "jne 3b",
                // A spin lock by xchg around an update that is not atomic.
                "4: mov eax, 1", "xchg dword ptr [{at} + 32], eax", "test eax, eax", "jz 5f", "pause", "jmp 4b",
                "5: inc qword ptr [{at} + 40]", "mov dword ptr [{at} + 32], 0",
                // The same by lock bts.
                "6: lock bts dword ptr [{at} + 48], 5", "jnc 7f", "pause", "jmp 6b",
                "7: mov rax, [{at} + 56]", "inc rax", "mov [{at} + 56], rax", "lock btr dword ptr [{at} + 48], 5",
                "dec {n}", "jnz 2b",
                at = in(reg) cell(0), n = inout(reg) ROUNDS => _, out("rax") _, out("rdx") _,
            );
        }
    });
    check("lock inc", peek(cell(0)), 2 * ROUNDS);
    check("lock xadd", peek(cell(1)), 2 * ROUNDS);
    check("lock add of a byte", peek(cell(2)) & 0xff, (6 * ROUNDS) & 0xff);
    check("lock sub of a word", peek(cell(2)) >> 16 & 0xffff, (2 * ROUNDS).wrapping_neg() & 0xffff);
    check("lock cmpxchg", peek(cell(3)), 2 * ROUNDS);
    check("a lock by xchg", peek(cell(5)), 2 * ROUNDS);
    check("a lock by bts", peek(cell(7)), 2 * ROUNDS);
    // A counter of 16 bytes whose halves belong together.
    poke(cell(0), 0);
    poke(cell(1), 0);
    WRONG.store(0, Ordering::SeqCst);
    both(|| {
        meet();
        let mut torn = 0u64;
        unsafe {
            asm!(
                "push rbx",
                "2:",
                "xor eax, eax", "xor edx, edx", "xor ebx, ebx", "xor ecx, ecx",
                "3: lock cmpxchg16b [rsi]", "je 4f",
                "cmp rax, rdx", "je 5f", "inc r8", "5:",
                "lea rbx, [rax + 1]", "lea rcx, [rdx + 1]", "jmp 3b",
                "4: dec rdi", "jnz 2b",
                "pop rbx",
                in("rsi") cell(0), inout("rdi") ROUNDS / 2 => _, inout("r8") torn,
                out("rax") _, out("rcx") _, out("rdx") _,
            );
        }
        WRONG.fetch_add(torn, Ordering::SeqCst);
    });
    check("cmpxchg16b is never torn", WRONG.load(Ordering::SeqCst), 0);
    check("cmpxchg16b keeps the halves together", peek(cell(0)), peek(cell(1)));
    // A locked update across two cache lines and across two pages.
    let split = frame(1) - 4;
    poke(split, 0);
    both(|| {
        meet();
        unsafe {
            asm!("2:", "lock inc qword ptr [{at}]", "lock add dword ptr [{line}], 1", "dec {n}", "jnz 2b",
                at = in(reg) frame(1) - 4, line = in(reg) frame(1) + 62, n = inout(reg) 2000u64 => _);
        }
    });
    check("lock inc across two pages", peek(split), 4000);
}

static WRONG: AtomicU64 = AtomicU64::new(0);
static SEEN: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

fn order() {
    // Store buffering: with a fence between store and load, not both may read zero.
    let litmus = |job: fn(), name: &str| {
        WRONG.store(0, Ordering::SeqCst);
        both(job);
        check(name, WRONG.load(Ordering::SeqCst), 0);
    };
    macro_rules! store_buffering {
        ($($line:literal),+) => {
            || {
                let (own, theirs) = if other() { (cell(0), cell(4)) } else { (cell(4), cell(0)) };
                rounds(2000, |_| {
                    poke(own, 0);
                    meet();
                    let seen: u64;
                    unsafe { asm!($($line),+, own = in(reg) own, theirs = in(reg) theirs, seen = out(reg) seen, out("rax") _) }
                    SEEN[usize::from(other())].store(seen, Ordering::SeqCst);
                    meet();
                    if !other() && SEEN[0].load(Ordering::SeqCst) == 0 && SEEN[1].load(Ordering::SeqCst) == 0 {
                        WRONG.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        };
    }
    litmus(
        store_buffering!("mov qword ptr [{own}], 1", "mfence", "mov {seen}, [{theirs}]"),
        "store buffering with mfence",
    );
    litmus(
        store_buffering!("mov eax, 1", "xchg [{own}], rax", "mov {seen}, [{theirs}]"),
        "store buffering with xchg",
    );
    litmus(
        store_buffering!("mov qword ptr [{own}], 1", "lock add dword ptr [rsp], 0", "mov {seen}, [{theirs}]"),
        "store buffering with a locked add",
    );
    // Message passing: who sees the flag sees the data.
    poke(cell(0), 0);
    poke(cell(4), 0);
    litmus(
        || {
            meet();
            for n in 1..=50_000u64 {
                if other() {
                    unsafe {
                        asm!("mov [{data}], {n}", "mov [{flag}], {n}", data = in(reg) cell(0), flag = in(reg) cell(4), n = in(reg) n)
                    }
                } else {
                    let (flag, data): (u64, u64);
                    unsafe {
                        asm!("mov {f}, [{flag}]", "mov {d}, [{data}]", f = out(reg) flag, d = out(reg) data, data = in(reg) cell(0), flag = in(reg) cell(4))
                    }
                    if data < flag {
                        WRONG.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        },
        "message passing",
    );
    // Plain aligned accesses are never torn.
    poke(cell(2), 0);
    litmus(
        || {
            meet();
            for n in 0..50_000u64 {
                if other() {
                    poke(cell(2), if n % 2 == 0 { u64::MAX } else { 0 });
                } else {
                    let value = peek(cell(2));
                    if value != 0 && value != u64::MAX {
                        WRONG.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        },
        "an aligned store of 8 bytes is never torn",
    );
    // Load buffering: both may not read what the other stores afterwards.
    litmus(
        || {
            let (own, theirs) = if other() { (cell(0), cell(4)) } else { (cell(4), cell(0)) };
            rounds(2000, |_| {
                poke(own, 0);
                meet();
                let seen: u64;
                unsafe {
                    asm!("mov {seen}, [{theirs}]", "mov qword ptr [{own}], 1", own = in(reg) own, theirs = in(reg) theirs, seen = out(reg) seen)
                }
                SEEN[usize::from(other())].store(seen, Ordering::SeqCst);
                meet();
                if !other() && SEEN[0].load(Ordering::SeqCst) == 1 && SEEN[1].load(Ordering::SeqCst) == 1 {
                    WRONG.fetch_add(1, Ordering::SeqCst);
                }
            });
        },
        "load buffering",
    );
    // The time-stamp counters agree well enough that a message never arrives before it was sent.
    litmus(
        || {
            rounds(2000, |_| {
                if other() {
                    SEEN[0].store(cpu::rdtsc(), Ordering::SeqCst);
                    meet();
                } else {
                    meet();
                    // The other one may be in the next round already: its message is read before the clock.
                    let sent = SEEN[0].load(Ordering::SeqCst);
                    if cpu::rdtsc() < sent {
                        WRONG.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        },
        "time stamps follow the order of events",
    );
}

const PAGE: u64 = TEST_BASE + 0x60_0000;
static FLUSHED: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn flush_page(_: &mut Frame, _: &mut Block) {
    cpu::invlpg(PAGE);
    FLUSHED.fetch_add(1, Ordering::SeqCst);
    apic::eoi();
}

fn shoot_down() -> bool {
    let before = FLUSHED.load(Ordering::SeqCst);
    cpu::invlpg(PAGE);
    apic::send_ipi(smp::apic_id(1), SHOOTDOWN);
    wait_until(|| FLUSHED.load(Ordering::SeqCst) != before)
}

static VALUE: AtomicU64 = AtomicU64::new(0);

fn translations() {
    use entry::{D, P, W};
    set_handler(SHOOTDOWN.into(), Some(flush_page));
    poke(frame(0), 0x1000);
    poke(frame(1), 0x2000);
    map(PAGE, frame(0) | P | W);
    STOP.store(false, Ordering::SeqCst);
    give(1, || {
        cpu::sti();
        while !STOP.load(Ordering::SeqCst) {
            VALUE.store(peek(PAGE), Ordering::SeqCst);
        }
        cpu::cli();
    });
    check_true(
        "the second processor reads through a page",
        wait_until(|| VALUE.load(Ordering::SeqCst) == 0x1000),
    );
    let mut wrong = 0;
    repeat(200, |n| {
        let target = u64::from(n % 2);
        poke(entry(PAGE, 1) as u64, frame(target) | P | W);
        wrong += u64::from(!shoot_down());
        // What it reads from now on comes from the new page: wait for two reads, as one may be on its way.
        VALUE.store(0, Ordering::SeqCst);
        wait_until(|| VALUE.load(Ordering::SeqCst) != 0);
        VALUE.store(0, Ordering::SeqCst);
        wait_until(|| VALUE.load(Ordering::SeqCst) != 0);
        wrong += u64::from(VALUE.load(Ordering::SeqCst) != 0x1000 * (target + 1));
    });
    check("after a shoot-down it reads the new page", wrong, 0);
    STOP.store(true, Ordering::SeqCst);
    join(1);
    // Taking away write permission.
    map(PAGE, frame(0) | P | W);
    STOP.store(false, Ordering::SeqCst);
    give(1, || {
        let end = run(Frame {
            rdi: PAGE,
            rflags: 0x202,
            ..Frame::kernel(code!("2: inc qword ptr [rdi]", "jmp 2b"))
        });
        VALUE.store(end.vector << 8 | end.error, Ordering::SeqCst);
    });
    VALUE.store(0, Ordering::SeqCst);
    poke(frame(0), 0);
    wait_until(|| peek(frame(0)) > 100);
    poke(entry(PAGE, 1) as u64, frame(0) | P);
    check_true("shoot-down of a page that is written", shoot_down());
    check_true("a write after it faults", join(1));
    check("with a protection fault", VALUE.load(Ordering::SeqCst), vector::PF << 8 | 3);
    let last = peek(frame(0));
    delay(1_000_000);
    check("and nothing is written afterwards", peek(frame(0)), last);
    map(PAGE, frame(0) | P | W);
    give(1, || {
        cpu::invlpg(PAGE);
        poke(PAGE, 5);
    });
    join(1);
    check("a write by the second processor sets dirty", peek(entry(PAGE, 1) as u64) & D, D);
    check("and arrives", peek(frame(0)), 5);
}

fn code_changes() {
    // mov eax, N; ret
    let function = frame(4) + 3;
    poke_bytes(function, &[0xb8, 1, 0, 0, 0, 0xc3]);
    WRONG.store(0, Ordering::SeqCst);
    // The second processor calls it when told, after a serializing instruction.
    both(|| {
        rounds(500, |n| {
            if !other() {
                poke_bytes(frame(4) + 4, &(n as u32).to_le_bytes());
                fence(Ordering::SeqCst);
            }
            meet();
            cpu::cpuid(0, 0);
            let value: u32;
            unsafe { asm!("call {}", in(reg) frame(4) + 3, out("eax") value) }
            if u64::from(value) != n {
                WRONG.fetch_add(1, Ordering::SeqCst);
            }
        });
    });
    check("changed code is seen after a serializing instruction", WRONG.load(Ordering::SeqCst), 0);
    // The roles the other way round, the function in another page.
    both(|| {
        rounds(500, |n| {
            if other() {
                poke_bytes(frame(5), &[0xb8]);
                poke_bytes(frame(5) + 1, &(n as u32).to_le_bytes());
                poke_bytes(frame(5) + 5, &[0xc3]);
                fence(Ordering::SeqCst);
            }
            meet();
            cpu::cpuid(0, 0);
            let value: u32;
            unsafe { asm!("call {}", in(reg) frame(5), out("eax") value) }
            if u64::from(value) != n {
                WRONG.fetch_add(1, Ordering::SeqCst);
            }
        });
    });
    check("changed code is seen the other way round", WRONG.load(Ordering::SeqCst), 0);
    if !tcg_lacks("code that changes all the time: the last change arrives") {
        unsynchronised_changes();
    }
}

/// Without synchronisation: only whole old or new values, in order, and the last one arrives.
fn unsynchronised_changes() {
    static WRITTEN: AtomicU32 = AtomicU32::new(0);
    poke_bytes(frame(6) + 3, &[0xb8, 0, 0, 0, 0, 0xc3]);
    STOP.store(false, Ordering::SeqCst);
    give(1, || {
        let mut last = 0u32;
        loop {
            let stop = STOP.load(Ordering::SeqCst);
            let value: u32;
            unsafe { asm!("call {}", in(reg) frame(6) + 3, out("eax") value) }
            if value < last || value > WRITTEN.load(Ordering::SeqCst) {
                WRONG.fetch_add(1, Ordering::SeqCst);
            }
            last = value;
            VALUE.store(value.into(), Ordering::SeqCst);
            if stop && value == WRITTEN.load(Ordering::SeqCst) {
                break;
            }
        }
    });
    repeat(5000, |n| {
        WRITTEN.store(n, Ordering::SeqCst);
        unsafe { ((frame(6) + 4) as *mut u32).write_volatile(n) }
        for _ in 0..10 {
            cpu::pause();
        }
    });
    STOP.store(true, Ordering::SeqCst);
    check_true("code that changes all the time: the last change arrives", join(1));
    check("and no other than old or new was seen", WRONG.load(Ordering::SeqCst), 0);
    // A loop of the second processor is ended by rewriting its jump: jmp to itself becomes ret.
    poke_bytes(frame(7), &[0xeb, 0xfe]);
    give(1, || unsafe { asm!("call {}", in(reg) frame(7)) });
    delay(1_000_000);
    unsafe { (frame(7) as *mut u16).write_volatile(0x90c3) }
    check_true("an endless loop ends when its code changes", join(1));
}

static NMIS: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn count_nmi(_: &mut Frame, _: &mut Block) {
    NMIS.fetch_add(1, Ordering::SeqCst);
}

fn halting_and_reset() {
    // NMI ends a halt with interrupts disabled.
    let id = smp::apic_id(1);
    set_handler(vector::NMI, Some(count_nmi));
    VALUE.store(0, Ordering::SeqCst);
    give(1, || {
        let halt = code!("hlt", "int 0xff");
        VALUE.store(1, Ordering::SeqCst);
        VALUE.store(run(Frame::kernel(halt)).vector, Ordering::SeqCst);
    });
    wait_until(|| VALUE.load(Ordering::SeqCst) == 1);
    apic::send_ipi(id, IPI);
    delay(10_000_000);
    check("hlt with interrupts disabled ignores interrupts", VALUE.load(Ordering::SeqCst), 1);
    // The first may come before the halt.
    let mut woken = false;
    for _ in 0..100 {
        if !woken {
            apic::send_ipi(id, 0x400);
            delay(10_000_000);
            woken = VALUE.load(Ordering::SeqCst) == vector::END;
        }
    }
    check_true("an NMI wakes it", woken);
    check_true("and was delivered", NMIS.load(Ordering::SeqCst) >= 1);
    join(1);
    // INIT stops a running processor until the next start-up message.
    static TICKS: AtomicU64 = AtomicU64::new(0);
    give(1, || {
        loop {
            TICKS.fetch_add(1, Ordering::SeqCst);
        }
    });
    check_true("it runs", wait_until(|| TICKS.load(Ordering::SeqCst) > 1000));
    let (starts, ready) = (smp::starts(), smp::ready());
    apic::send_ipi(id, 0x4500);
    apic::send_ipi(id, IPI);
    delay(2_000_000);
    check("neither INIT nor an interrupt starts it", smp::starts().into(), starts.into());
    // Its number follows from the count of starts: let it take the same block again.
    smp::reuse(1);
    smp::forget(1);
    apic::send_ipi(id, 0x4600 | smp::START_PAGE);
    check_true("a start-up message starts it again", wait_until(|| smp::ready() == ready + 1));
    let ticks = TICKS.load(Ordering::SeqCst);
    VALUE.store(0, Ordering::SeqCst);
    give(1, || VALUE.store(77, Ordering::SeqCst));
    join(1);
    check("and it works", VALUE.load(Ordering::SeqCst), 77);
    check("INIT ended what it did before", TICKS.load(Ordering::SeqCst), ticks);
    set_handler(vector::NMI, None);
}
