//! Linker flags of the guests.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=link.ld");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/link.ld");
    for flag in [
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=0x1000",
        "-T",
        script,
    ] {
        println!("cargo::rustc-link-arg-bins={flag}");
    }
}
