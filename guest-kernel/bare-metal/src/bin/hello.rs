//! The smallest guest: says hello by a hypercall and ends with the code `code=N` of its command line.
//!
//! `harrier run --kernel PATH --cmdline code=3` prints `hello` and exits with 3.

#![no_std]
#![no_main]

use harrier_bare_metal::{boot, guest_main, hypercall};

guest_main!(main);

fn main() {
    hypercall::mark(1, "", 0);
    hypercall::console(b"hello\n");
    let code = boot::parameter("code").unwrap_or(0);
    hypercall::exit(code as u32, 0, "");
}
