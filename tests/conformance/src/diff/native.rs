//! The processor's side: a child process with the window, in which the program runs as it stands.
#![expect(unsafe_code, reason = "runs generated machine code in a process of its own")]

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use super::layout::{
    BASE, Bits, CODE, CODE64, DATA, DATA_LEN, EXIT, FAULT, HOLE, HOST_ENTRY, PROGRAM, READ_ONLY, SAVER,
    SECOND_HOLE, SHORT_CODE_LIMIT, SHORT_DATA_LIMIT, SHORT_TAKEN, TAKEN, TAKEN_POINTER, WINDOW, host_entry,
    program, short_taken, taken,
};

const PAGE: usize = 4096;
/// Seconds that a batch may take; it needs thousandths of one.
const PATIENCE_S: u32 = 60;

/// The child, and its window as this process sees it.
pub(super) struct Native {
    child: libc::pid_t,
    commands: OwnedFd,
    answers: OwnedFd,
    window: *mut u8,
}

impl Native {
    /// Starts the child.
    pub(super) fn start(bits: Bits) -> io::Result<Native> {
        let file = checked(
            // SAFETY: a new file descriptor, with a name that ends in zero.
            unsafe { libc::memfd_create(c"harrier-diff".as_ptr(), libc::MFD_CLOEXEC) },
        )?;
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        // SAFETY: plain calls on an own descriptor; the mapping is new.
        let window = unsafe {
            checked(libc::ftruncate(file.as_raw_fd(), WINDOW as libc::off_t))?;
            map(std::ptr::null_mut(), libc::PROT_READ | libc::PROT_WRITE, 0, &file)?
        };
        let (commands, command_source) = pipe()?;
        let (answer_source, answers) = pipe()?;
        // SAFETY: the child calls only functions that a signal handler may call, and never returns.
        let child = checked(unsafe { libc::fork() })?;
        if child == 0 {
            serve(&file, &commands, &answers, bits);
        }
        let native = Native { child, commands: command_source, answers: answer_source, window };
        let (program, saver) = program(bits);
        let (entry, exit) = host_entry();
        native.write(PROGRAM, &program);
        native.write(TAKEN, &taken(bits));
        native.write(CODE + SHORT_TAKEN, &short_taken());
        native.write(TAKEN_POINTER, &TAKEN.to_le_bytes());
        native.write(HOST_ENTRY, &entry);
        native.write(EXIT, &exit.to_le_bytes());
        native.write(SAVER, &(PROGRAM + saver).to_le_bytes());
        Ok(native)
    }

    /// Writes into the window.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        let offset = (at - BASE) as usize;
        assert!(offset + bytes.len() <= WINDOW, "a write beyond the window");
        // SAFETY: inside the mapping; the child does not run now.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.window.add(offset), bytes.len()) }
    }

    /// Reads from the window.
    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let offset = (at - BASE) as usize;
        assert!(offset + len <= WINDOW, "a read beyond the window");
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.window.add(offset), len).to_vec() }
    }

    /// Runs the program once. An error means that the child did not survive.
    pub(super) fn run(&self) -> io::Result<()> {
        let mut byte = [1u8];
        // SAFETY: one byte of ours, out and back.
        let done = unsafe {
            libc::write(self.commands.as_raw_fd(), byte.as_ptr().cast(), 1) == 1
                && libc::read(self.answers.as_raw_fd(), byte.as_mut_ptr().cast(), 1) == 1
        };
        if done { Ok(()) } else { Err(io::Error::other("the process that runs the cases has died")) }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: our own child and our own mapping.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
            libc::munmap(self.window.cast(), WINDOW);
        }
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: two new descriptors, which become owned at once.
    unsafe {
        checked(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// Maps the window.
///
/// # Safety
/// An address that is named must be free, or to be replaced.
unsafe fn map(at: *mut u8, protection: i32, flags: i32, file: &OwnedFd) -> io::Result<*mut u8> {
    // SAFETY: the caller's word.
    let mapped =
        unsafe { libc::mmap(at.cast(), WINDOW, protection, libc::MAP_SHARED | flags, file.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped.cast()) }
}

/// The child: runs the program whenever a byte comes.
fn serve(file: &OwnedFd, commands: &OwnedFd, answers: &OwnedFd, bits: Bits) -> ! {
    /// Bytes for the signal handler, whose frame holds all registers.
    const SIGNAL_STACK: usize = 128 * 1024;
    // SAFETY: this is a process of its own, forked for this. The window's place is free or the child ends; the handler
    // gets a stack of its own; the entry is code that `start` wrote before the first command came and that keeps what
    // the calling convention asks for.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        if map(BASE as *mut u8, all, libc::MAP_FIXED_NOREPLACE, file).is_err() {
            libc::_exit(1);
        }
        // Nothing but the program and the cases is code.
        let data = (WINDOW as u64 - (DATA - BASE)) as usize;
        libc::mprotect(DATA as *mut libc::c_void, data, libc::PROT_READ | libc::PROT_WRITE);
        for hole in [HOLE, SECOND_HOLE] {
            libc::mprotect(hole as *mut libc::c_void, PAGE, libc::PROT_NONE);
        }
        libc::mprotect(READ_ONLY as *mut libc::c_void, PAGE, libc::PROT_READ);
        let stack = libc::mmap(
            std::ptr::null_mut(),
            SIGNAL_STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        let stack = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: SIGNAL_STACK };
        libc::sigaltstack(&stack, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
        if bits == Bits::Short && !put_short_segments(bits) {
            libc::_exit(3);
        }
        let mut byte = [0u8];
        while libc::read(commands.as_raw_fd(), byte.as_mut_ptr().cast(), 1) == 1 {
            // The pages are there before a case faults on them, so that error codes say what is forbidden.
            for at in (DATA..HOLE).step_by(PAGE).chain([READ_ONLY]) {
                std::ptr::read_volatile(at as *const u8);
            }
            for at in (DATA..DATA + DATA_LEN as u64).step_by(PAGE) {
                let at = at as *mut u8;
                std::ptr::write_volatile(at, std::ptr::read_volatile(at));
            }
            libc::alarm(PATIENCE_S);
            std::mem::transmute::<u64, extern "sysv64" fn()>(HOST_ENTRY)();
            libc::alarm(0);
            libc::write(answers.as_raw_fd(), byte.as_ptr().cast(), 1);
        }
        libc::_exit(0);
    }
}

/// Fills the process's local descriptor table: code, then data (modify_ldt(2)).
fn put_short_segments(bits: Bits) -> bool {
    /// modify_ldt's words: number, base, limit, and flags with the contents in bits 2:1.
    const WRITE: libc::c_int = 0x11;
    const CODE_SEGMENT: u32 = 2 << 1;
    const USEABLE: u32 = 1 << 6;
    let segments = [
        [0, bits.code_base() as u32, SHORT_CODE_LIMIT, CODE_SEGMENT | USEABLE],
        [1, bits.data_base() as u32, SHORT_DATA_LIMIT, USEABLE],
    ];
    segments.iter().all(|segment| {
        let bytes = std::mem::size_of_val(segment);
        // SAFETY: the kernel reads the four words.
        unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, segment.as_ptr(), bytes) == 0 }
    })
}

/// Writes a fault down and goes on where registers are saved.
extern "C" fn on_fault(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a context over; the window is mapped.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let word = |register: libc::c_int| registers[register as usize] as u64;
        let rip = word(libc::REG_RIP);
        let short = 0..1 << 16;
        if !(BASE..BASE + WINDOW as u64).contains(&rip)
            && !short.contains(&rip)
            && word(libc::REG_TRAPNO) != 14
        {
            // Not a case's doing, unless it jumped to where nothing is. Those of 16 bits have offsets.
            libc::_exit(2);
        }
        let fault = FAULT as *mut u64;
        fault.write(word(libc::REG_TRAPNO) + 1);
        fault.add(1).write(word(libc::REG_ERR));
        fault.add(2).write(word(libc::REG_CR2));
        fault.add(3).write(rip);
        let saver = (SAVER as *const u64).read();
        // A case that switched single steps on has had its one.
        registers[libc::REG_EFL as usize] &= !0x100;
        registers[libc::REG_RIP as usize] = saver as i64;
        // CS is the low word.
        let segments = &mut registers[libc::REG_CSGSFS as usize];
        *segments = *segments & !0xffff | i64::from(CODE64);
    }
}
