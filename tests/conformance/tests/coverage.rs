//! What CPUID shows of a CPU model is there, what it hides raises #UD, and the page that says so is of this code.

use harrier_conformance::coverage::{self, MODELS};
use iced_x86::Code;

#[test]
fn what_cpuid_shows_is_executed_and_what_it_hides_raises_ud() {
    let survey = coverage::survey().unwrap();
    let disagreements = survey.disagreements();
    assert!(disagreements.is_empty(), "{}", disagreements.join("\n"));
    // The survey saw what it should: an instruction of each model, and one of none.
    let executed = |code: Code| {
        let seen = survey.seen.iter().find(|seen| seen.code == code).unwrap();
        seen.executed.map(|executed| executed != Some(false))
    };
    assert!(survey.seen.len() > 4_000, "{}", survey.seen.len());
    assert_eq!(executed(Code::Add_rm32_r32), [true; MODELS.len()]);
    assert_eq!(executed(Code::Pushd_CS), [true; MODELS.len()]);
    assert_eq!(executed(Code::Popcnt_r64_rm64), [false, true, true, true]);
    assert_eq!(executed(Code::VEX_Vpaddd_ymm_ymm_ymmm256)[..2], [false, false]);
    let none = survey.seen.iter().find(|seen| seen.code == Code::EVEX_Vpaddd_zmm_k1z_zmm_zmmm512b32).unwrap();
    assert!(none.executed.iter().all(|executed| *executed != Some(true)));
}

#[test]
fn the_page_of_instructions_is_that_of_the_code() {
    let page = coverage::page(&coverage::survey().unwrap());
    let kept = include_str!("../../../docs/instructions.md");
    assert!(
        kept == page,
        "docs/instructions.md is old: cargo xtask conformance coverage > docs/instructions.md"
    );
}
