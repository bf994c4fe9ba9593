//! What is checked in is what the tables say.

use std::path::Path;
use std::process::Command;

use harrier_hypercall_abi::block::{ALIGN, Block, CHANNELS, PAYLOAD};
use harrier_hypercall_abi::calls::{self, CALLS, ClockArgs, ExitArgs};
use harrier_hypercall_abi::shared_page::ClockPage;
use harrier_hypercall_abi::{Status, port, reference};

const BEGIN: &str = "<!-- generated: cargo run -p harrier-hypercall-abi -- markdown -->";
const END: &str = "<!-- end -->";
const HEADER: &str = "../include/harrier_hypercall.h";

fn header() -> String {
    let mut text = String::new();
    reference::c_header(&mut text).unwrap();
    text
}

#[test]
fn the_c_header_is_the_one_that_the_tables_give() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(HEADER);
    let found = std::fs::read_to_string(path).unwrap();
    assert!(
        found == header(),
        "guest-kernel/include/harrier_hypercall.h is old: write it again with \
         `cargo run -p harrier-hypercall-abi -- header`"
    );
}

#[test]
fn the_document_has_the_reference_that_the_tables_give() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/hypercalls.md");
    let document = std::fs::read_to_string(path).unwrap();
    let (before, rest) = document.split_once(BEGIN).expect("the document says where the reference begins");
    let (found, _) = rest.split_once(END).expect("the document says where the reference ends");
    let mut expected = String::new();
    reference::markdown(&mut expected).unwrap();
    assert!(
        found.trim() == expected.trim(),
        "the reference in docs/hypercalls.md is old: replace it by the output of \
         `cargo run -p harrier-hypercall-abi -- markdown`"
    );
    // What people read before it names the same caps and places.
    for text in [
        port::ACPI_ID.to_owned(),
        format!("port {:#x}", port::BASE),
        format!("| {} |", calls::CONSOLE_MAX),
        format!("| {}, {} MiB |", calls::MEM_RELEASE_MAX_RANGES, calls::MEM_RELEASE_MAX_BYTES >> 20),
        format!("| {} |", calls::MARKS_MAX),
        format!("each of {} channels", CHANNELS),
        format!("block of {} bytes, aligned to {}", Block::SIZE, ALIGN),
    ] {
        assert!(before.contains(&text), "the document does not say '{text}'");
    }
}

/// The header's own assertions hold for a C compiler, and so do the offsets.
#[test]
fn a_c_compiler_sees_the_same_layout() {
    let compiler = ["cc", "gcc", "clang"].into_iter().find(|name| {
        Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success())
    });
    let Some(compiler) = compiler else {
        println!("skipped: no C compiler");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut source = header();
    source.push_str("#include <stddef.h>\n");
    for layout in reference::layouts() {
        let name: String = layout
            .name
            .chars()
            .flat_map(|c| c.is_ascii_uppercase().then_some('_').into_iter().chain([c.to_ascii_lowercase()]))
            .collect();
        for field in layout.fields {
            source.push_str(&format!(
                "_Static_assert(offsetof(struct harrier{name}, {}) == {}, \"\");\n",
                field.name, field.offset
            ));
        }
    }
    let file = folder.path().join("check.c");
    std::fs::write(&file, source).unwrap();
    let output =
        Command::new(compiler).args(["-std=gnu11", "-Wall", "-Werror", "-fsyntax-only"]).arg(file).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn bytes_and_structures_are_converted_both_ways() {
    let bytes: [u8; Block::SIZE] = std::array::from_fn(|index| index as u8 ^ 0x80);
    let block = Block::from_bytes(&bytes);
    assert_eq!(block.to_bytes(), bytes);
    assert_eq!((block.version, block.number), (0x8180, 0x8382));
    assert_eq!(block.status, i32::from_le_bytes([0x94, 0x95, 0x96, 0x97]));
    assert_eq!(block.args.len(), PAYLOAD);
    let clock: [u8; ClockPage::SIZE] = std::array::from_fn(|index| 255 - index as u8);
    assert_eq!(ClockPage::from_bytes(&clock).to_bytes(), clock);
    assert_eq!(ClockArgs::from_bytes(&[1, 2]), ClockArgs { tsc: 0x201 });
    assert_eq!(ExitArgs::from_bytes(&[]), ExitArgs::default());
}

#[test]
fn every_number_and_status_is_found_again() {
    for call in CALLS {
        assert_eq!(calls::find(call.number).map(|found| found.name), Some(call.name));
    }
    for number in [0, CALLS.len() as u16 + 1, u16::MAX] {
        assert!(calls::find(number).is_none());
    }
    for status in Status::ALL {
        assert_eq!(Status::from_value(*status as i32), Some(*status));
    }
    assert_eq!(Status::from_value(-10), None);
    let mut bits: Vec<u64> = CALLS.iter().map(|call| call.feature).filter(|bit| *bit != 0).collect();
    bits.dedup();
    assert_eq!(bits.len(), CALLS.len() - 1, "features have bits of their own");
    assert!(bits.iter().all(|bit| bit.is_power_of_two()));
}
