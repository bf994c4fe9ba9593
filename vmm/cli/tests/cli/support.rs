//! Small guests made of a few instructions, and running `harrier` on them.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use harrier_hypercall_abi::block::{ALIGN, Block, RESULT_OFFSET, STATUS_OFFSET};
use harrier_hypercall_abi::calls::{CheckpointArgs, ConsoleArgs, ExitArgs, MemRange, MemReleaseArgs, number};
use harrier_hypercall_abi::{Status, VERSION_MAJOR, port};

/// Where the code is loaded and begins.
const ENTRY: u64 = 0x100_0000;

/// Machine code for the guests below, in 64-bit mode.
#[derive(Default)]
pub(crate) struct Code {
    bytes: Vec<u8>,
}

impl Code {
    /// `mov dx, port; mov al, value; out dx, al`
    pub(crate) fn out(mut self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes.extend_from_slice(&[0x66, 0xba, low, high, 0xb0, value, 0xee]);
        self
    }

    /// Prints on the serial port.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(0x3f8, byte))
    }

    /// `ud2`, which without an IDT is a triple fault.
    pub(crate) fn fault(mut self) -> Self {
        self.bytes.extend_from_slice(&[0x0f, 0x0b]);
        self
    }

    /// `cli; jmp .`
    pub(crate) fn spin(mut self) -> Self {
        self.bytes.extend_from_slice(&[0xfa, 0xeb, 0xfe]);
        self
    }

    /// `cli; hlt; jmp` back to the hlt.
    pub(crate) fn halt(mut self) -> Self {
        self.bytes.extend_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
        self
    }

    /// Copies bytes from the serial port to the serial port until a newline has passed.
    pub(crate) fn echo_line(mut self) -> Self {
        self.bytes.extend_from_slice(&[
            0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
            0xec, // in al, dx
            0xa8, 0x01, // test al, 1
            0x74, 0xfb, // jz in
            0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
            0xec, // in al, dx
            0xee, // out dx, al
            0x3c, 0x0a, // cmp al, 10
            0x75, 0xed, // jne start
        ]);
        self
    }

    /// Puts data beside the code, aligned to 64 bytes, and answers its address.
    fn data(&mut self, data: &[u8]) -> u64 {
        // jmp over it
        let at = (self.bytes.len() + 5).next_multiple_of(64);
        let distance = (at + data.len() - self.bytes.len() - 5) as u32;
        self.bytes.push(0xe9);
        self.bytes.extend_from_slice(&distance.to_le_bytes());
        self.bytes.resize(at, 0x90);
        self.bytes.extend_from_slice(data);
        ENTRY + at as u64
    }

    /// Makes a hypercall, which must succeed: anything else is a triple fault.
    pub(crate) fn hypercall(mut self, number: u16, args: &[u8]) -> Self {
        let mut block = Block {
            version: VERSION_MAJOR,
            number,
            args_len: args.len() as u32,
            status: Status::Pending as i32,
            ..Block::default()
        };
        block.args[..args.len()].copy_from_slice(args);
        let gpa = self.data(&block.to_bytes());
        let [low, high] = port::BASE.to_le_bytes();
        let place = ((gpa / ALIGN) as u32).to_le_bytes();
        let status = ((gpa + STATUS_OFFSET) as u32).to_le_bytes();
        // mov dx, port; mov eax, place; out dx, eax; cmp dword ptr [status], 0; jz over; ud2
        self.bytes.extend_from_slice(&[0x66, 0xba, low, high, 0xb8]);
        self.bytes.extend_from_slice(&place);
        self.bytes.extend_from_slice(&[0xef, 0x83, 0x3c, 0x25]);
        self.bytes.extend_from_slice(&status);
        self.bytes.extend_from_slice(&[0, 0x74, 2, 0x0f, 0x0b]);
        self
    }

    /// Prints by CONSOLE.
    pub(crate) fn print_by_call(mut self, text: &str) -> Self {
        let gpa = self.data(text.as_bytes());
        self.hypercall(number::CONSOLE, &ConsoleArgs { gpa, len: text.len() as u32, reserved: 0 }.to_bytes())
    }

    /// Releases a page of memory that the guest does not use.
    pub(crate) fn release_a_page(mut self) -> Self {
        let list_gpa = self.data(&MemRange { gpa: 0x200_0000, len: 4096 }.to_bytes());
        let args = MemReleaseArgs { list_gpa, count: 1, reserved: 0 };
        self.hypercall(number::MEM_RELEASE, &args.to_bytes())
    }

    /// Takes a CHECKPOINT and ends the machine by EXIT with 20 and the role as whom the call returned.
    pub(crate) fn checkpoint_and_exit_as_role(mut self) -> Self {
        let block = |number, args: &[u8]| {
            let mut block =
                Block { version: VERSION_MAJOR, number, args_len: args.len() as u32, ..Block::default() };
            block.args[..args.len()].copy_from_slice(args);
            block.to_bytes()
        };
        let checkpoint = self.data(&block(number::CHECKPOINT, &CheckpointArgs::default().to_bytes()));
        let exit = self.data(&block(number::EXIT, &ExitArgs::default().to_bytes()));
        let address = |gpa: u64| (gpa as u32).to_le_bytes();
        let [low, high] = port::BASE.to_le_bytes();
        // mov dx, port; mov eax, place; out dx, eax
        self.bytes.extend_from_slice(&[0x66, 0xba, low, high, 0xb8]);
        self.bytes.extend_from_slice(&address(checkpoint / ALIGN));
        // mov eax, [role]; add eax, 20; mov [code], eax
        self.bytes.extend_from_slice(&[0xef, 0x8b, 0x04, 0x25]);
        self.bytes.extend_from_slice(&address(checkpoint + RESULT_OFFSET + 8));
        self.bytes.extend_from_slice(&[0x83, 0xc0, 20, 0x89, 0x04, 0x25]);
        self.bytes.extend_from_slice(&address(exit + 32));
        // mov eax, place; out dx, eax
        self.bytes.push(0xb8);
        self.bytes.extend_from_slice(&address(exit / ALIGN));
        self.bytes.push(0xef);
        self.spin()
    }

    /// Ends the machine by EXIT.
    pub(crate) fn exit(self, code: u32, reason: u32, words: &str) -> Self {
        let mut message = [0; 32];
        message[..words.len()].copy_from_slice(words.as_bytes());
        self.hypercall(number::EXIT, &ExitArgs { code, reason, message }.to_bytes())
    }

    /// An ELF kernel with a 64-bit entry.
    pub(crate) fn kernel(self) -> Vec<u8> {
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        file.resize(16, 0);
        file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [ENTRY, 64, 0] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        file.extend_from_slice(&[1, 0, 0, 0, 7, 0, 0, 0]);
        let len = self.bytes.len() as u64;
        for word in [120, ENTRY, ENTRY, len, len, 4096] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&self.bytes);
        file
    }
}

/// A kernel file that goes away with this value.
pub(crate) struct KernelFile {
    _dir: tempfile::TempDir,
    pub(crate) path: String,
}

impl KernelFile {
    pub(crate) fn new(code: Code) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel").to_str().unwrap().to_owned();
        std::fs::write(&path, code.kernel()).unwrap();
        KernelFile { _dir: dir, path }
    }
}

/// The cache that `cargo xtask` fills.
pub(crate) fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HARRIER_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("harrier")))
        .or_else(|| set("HOME").map(|dir| dir.join(".cache/harrier")))
        .unwrap()
}

/// A command line of `harrier` with all its streams piped. Which engine was taken, and why, is not said, since it depends on
/// the host.
pub(crate) fn harrier(args: &[&str]) -> Command {
    const WITH_ENGINE: [&str; 2] = ["run", "restore"];
    let mut args = args.to_vec();
    let named =
        args.iter().any(|arg| ["--engine", "--quiet", "-q", "-v", "--verbose", "--help"].contains(arg));
    if let Some(at) = args.iter().take(3).position(|arg| WITH_ENGINE.contains(arg))
        && !named
    {
        args.insert(at + 1, "--quiet");
    }
    talkative(&args)
}

/// As [`harrier`], with everything that it says.
pub(crate) fn talkative(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_harrier"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The end of a run that has to come by itself, and soon.
pub(crate) fn output(args: &[&str]) -> Output {
    wait(harrier(args).spawn().unwrap())
}

/// Exit code, stdout and stderr as text.
pub(crate) fn texts(output: Output) -> (i32, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// Sends a signal to a child, by name.
pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits for a child, but not for ever; what it writes is read meanwhile.
pub(crate) fn wait(child: Child) -> Output {
    let id = child.id();
    let (done, ended) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let output = child.wait_with_output();
        // The other end is gone only when the test has failed.
        let _ = done.send(());
        output
    });
    if ended.recv_timeout(Duration::from_secs(100)).is_err() {
        let _ = Command::new("kill").args(["-KILL", &id.to_string()]).status();
        panic!("harrier did not end");
    }
    reader.join().unwrap().unwrap()
}
