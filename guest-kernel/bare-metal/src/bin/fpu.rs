//! x87, MMX and SSE: known results, the state-saving instructions, and the exceptions that control registers and control
//! words cause.

#![no_std]
#![no_main]

use harrier_bare_metal::cpu::{self, cr0, cr4};
use harrier_bare_metal::paging::{
    TEST_BASE, entry, frame, map, peek, peek8, poke, poke_bytes, user, user_stack,
};
use harrier_bare_metal::trap::{Block, run_controlled, set_handler, vector};
use harrier_bare_metal::{Frame, check, check_bytes, check_true, code, code64, guest_main, run, tcg_lacks};

guest_main!(main);

const DATA: u64 = frame(40);

fn main() {
    x87();
    x87_exceptions();
    sse();
    sse4();
    sse_exceptions();
    save_and_restore();
    unavailable();
    memory_operands();
}

fn exec(code: u64) -> Frame {
    run(Frame { rsi: DATA, rdi: DATA + 64, ..Frame::kernel(code) })
}

fn word(value: f64) -> u64 {
    value.to_bits()
}

fn x87() {
    let end = exec(code64!("fninit", "fnstcw [rsi]", "fnstsw ax", "fnstsw [rsi + 2]"));
    check("fninit: control word", peek(DATA) & 0xffff, 0x37f);
    check("fninit: status word", end.rax & 0xffff, 0);
    poke(DATA, word(2.0));
    poke(DATA + 8, word(0.5));
    exec(code64!(
        "fninit",
        "fld qword ptr [rsi]",
        "fsqrt",
        "fst qword ptr [rdi]",
        "fadd qword ptr [rsi + 8]",
        "fstp qword ptr [rdi + 8]",
        "fldpi",
        "fstp qword ptr [rdi + 16]",
        "fld1",
        "fld1",
        "faddp",
        "fistp qword ptr [rdi + 24]"
    ));
    check("fsqrt", peek(DATA + 64), 0x3ff6_a09e_667f_3bcd);
    check("fadd", peek(DATA + 72), 0x3ffe_a09e_667f_3bcd);
    check("fldpi", peek(DATA + 80), 0x4009_21fb_5444_2d18);
    check("fistp", peek(DATA + 88), 2);
    poke(DATA, 0x8000_0000_0000_0001);
    exec(code64!(
        "fninit",
        "fild qword ptr [rsi]",
        "fstp tbyte ptr [rdi]",
        "fld tbyte ptr [rdi]",
        "fistp qword ptr [rdi + 16]"
    ));
    check("fild keeps 64 bits", peek(DATA + 64), 0xffff_ffff_ffff_fffe);
    check("fild: sign and exponent", peek(DATA + 72) & 0xffff, 0xc03d);
    check("fistp gives them back", peek(DATA + 80), 0x8000_0000_0000_0001);
    let end = exec(code64!(
        "fninit",
        "fld1",
        "fldz",
        "fcomip st, st(1)",
        "setb al",
        "fcomp st",
        "fldz",
        "fldl2e",
        "fucompp",
        "fnstsw ax",
        "mov ecx, eax"
    ));
    check("fcomi sets the flags", end.rcx & 0x4500, 0x0000);
    let end = exec(code64!("fninit", "fld1", "fldz", "fcompp", "fnstsw ax", "sahf", "setb cl"));
    check("fcom and sahf", end.rcx & 0xff, 1);
    let end = exec(code64!(
        "fninit",
        "fldz",
        "fld1",
        "fxam",
        "fnstsw ax",
        "fxch st(1)",
        "fxam",
        "fnstsw [rsi]",
        "fstp st",
        "fstp st",
        "fxam",
        "mov ecx, [rsi]",
        "fnstsw [rsi + 4]"
    ));
    check("fxam of one", end.rax & 0x4700, 0x0400);
    check("fxam of zero", end.rcx & 0x4700, 0x4000);
    check("fxam of an empty register", peek(DATA) >> 32 & 0x4500, 0x4100);
    poke(DATA, word(7.5));
    poke(DATA + 8, word(2.0));
    exec(code64!(
        "fninit",
        "fld qword ptr [rsi + 8]",
        "fld qword ptr [rsi]",
        "fprem",
        "fstp qword ptr [rdi]",
        "fstp st",
        "fld qword ptr [rsi]",
        "frndint",
        "fstp qword ptr [rdi + 8]",
        "fld1",
        "fld qword ptr [rsi + 8]",
        "fxch",
        "fscale",
        "fstp qword ptr [rdi + 16]",
        "fstp st",
        "fld qword ptr [rsi]",
        "fxtract",
        "fstp qword ptr [rdi + 24]",
        "fstp qword ptr [rdi + 32]"
    ));
    check("fprem", peek(DATA + 64), word(1.5));
    check("frndint to even", peek(DATA + 72), word(8.0));
    check("fscale", peek(DATA + 80), word(4.0));
    check("fxtract: significand", peek(DATA + 88), word(1.875));
    check("fxtract: exponent", peek(DATA + 96), word(2.0));
    exec(code64!(
        "fninit",
        "fld qword ptr [rsi]",
        "fisttp dword ptr [rdi]",
        "fld qword ptr [rsi]",
        "fchs",
        "fabs",
        "fbstp tbyte ptr [rdi + 16]",
        "fbld tbyte ptr [rdi + 16]",
        "fstp qword ptr [rdi + 32]"
    ));
    check("fisttp truncates", peek(DATA + 64) & 0xffff_ffff, 7);
    check("fbstp", peek(DATA + 80), 8);
    check("fbld", peek(DATA + 96), word(8.0));
    poke(DATA, 0x0f7f);
    exec(code64!(
        "fninit",
        "fldcw [rsi]",
        "fldpi",
        "fistp dword ptr [rdi]",
        "fldpi",
        "fchs",
        "fistp dword ptr [rdi + 4]",
        "fninit"
    ));
    check("rounding toward zero", peek(DATA + 64), 0xffff_fffd_0000_0003);
    poke(DATA, 0x007f);
    poke(DATA + 8, word(1.0));
    poke(DATA + 16, word(3.0));
    exec(code64!(
        "fninit",
        "fldcw [rsi]",
        "fld qword ptr [rsi + 8]",
        "fdiv qword ptr [rsi + 16]",
        "fstp qword ptr [rdi]",
        "fninit"
    ));
    check("single precision", peek(DATA + 64), 0x3fd5_5555_6000_0000);
    let end = exec(code64!(
        "fninit",
        "fld1",
        "fldpi",
        "fldz",
        "fdecstp",
        "fincstp",
        "ffree st(1)",
        "fnstenv [rdi]",
        "fnstsw ax"
    ));
    check("the top of the stack", end.rax >> 11 & 7, 5);
    check("the tag word", peek(DATA + 64 + 8) & 0xffff, 0b00_11_01_11_11_11_11_11);
    exec(code64!(
        "fninit",
        "fld1",
        "fld1",
        "fcmovnbe st, st(1)",
        "stc",
        "fldz",
        "fcmovb st, st(1)",
        "fstp qword ptr [rdi]",
        "fninit"
    ));
    check("fcmov", peek(DATA + 64), word(1.0));
    poke(DATA, word(1.0));
    poke(DATA + 8, word(0.5));
    exec(code64!(
        "fninit",
        "fld qword ptr [rsi]",
        "fld qword ptr [rsi]",
        "fpatan",
        "fstp qword ptr [rdi]",
        "fld qword ptr [rsi + 8]",
        "fsin",
        "fstp qword ptr [rdi + 8]",
        "fld qword ptr [rsi + 8]",
        "f2xm1",
        "fstp qword ptr [rdi + 16]",
        "fld1",
        "fld qword ptr [rsi + 8]",
        "fyl2x",
        "fstp qword ptr [rdi + 24]"
    ));
    let near = |at: u64, expected: f64| peek(at).abs_diff(word(expected)) <= 1;
    check_true("fpatan", near(DATA + 64, core::f64::consts::FRAC_PI_4));
    check_true("fsin", near(DATA + 72, 0.479_425_538_604_203));
    check_true("f2xm1", near(DATA + 80, 0.414_213_562_373_095_05));
    check("fyl2x", peek(DATA + 88), word(-1.0));
    // MMX shares the registers.
    poke(DATA, 0x0102_0304_0506_0708);
    let end = exec(code64!(
        "fninit",
        "movq mm0, [rsi]",
        "paddb mm0, mm0",
        "pshufw mm1, mm0, 0x1b",
        "movq [rdi], mm0",
        "movq [rdi + 8], mm1",
        "fnstenv [rdi + 16]",
        "emms",
        "fnstenv [rdi + 48]",
        "fnstsw ax"
    ));
    check("paddb", peek(DATA + 64), 0x0204_0608_0a0c_0e10);
    check("pshufw", peek(DATA + 72), 0x0e10_0a0c_0608_0204);
    let tags = peek(DATA + 64 + 16 + 8);
    check("an MMX instruction leaves no register empty", tags & tags >> 1 & 0x5555, 0);
    check("emms makes them empty", peek(DATA + 64 + 48 + 8) & 0xffff, 0xffff);
    check("and leaves the top at zero", end.rax >> 11 & 7, 0);
}

fn x87_exceptions() {
    let end = exec(code64!("fninit", "fld1", "fldz", "fdivp", "fnstsw ax", "fstp qword ptr [rdi]"));
    check("a masked division by zero is infinite", peek(DATA + 64), word(f64::INFINITY));
    check("and noted", end.rax & 0x84, 0x04);
    if !tcg_lacks("stack underflow") {
        let end = exec(code64!("fninit", "fstp st", "fnstsw ax"));
        check("stack underflow", end.rax & 0x241, 0x41);
        let end = exec(code64!("fninit", ".rept 9", "fld1", ".endr", "fnstsw ax", "fninit"));
        check("stack overflow", end.rax & 0x241, 0x241);
    }
    // Unmasked: the next waiting instruction faults.
    poke(DATA, 0x37b);
    let div = code!("fninit", "fldcw [rsi]", "fld1", "fldz", "fdivp", "nop", "fnop", "int 0xff");
    let end = exec(div);
    check("an unmasked division by zero", end.vector, vector::MF);
    check("faults at the next instruction of the unit", peek8(end.rip).into(), 0xd9);
    let end = exec(code!("fnstsw ax", "fnclex", "fninit", "int 0xff"));
    check("instructions that do not wait do not fault", end.vector, vector::END);
    check("the summary bit is set", end.rax & 0x8084, 0x8084);
    let end = exec(code!("fninit", "fldcw [rsi]", "fld1", "fldz", "fdivp", "fwait", "int 0xff"));
    check("fwait faults", end.vector, vector::MF);
    let end = exec(code!("fnclex", "fwait", "fninit", "int 0xff"));
    check("and not after fnclex", end.vector, vector::END);
}

fn sse() {
    poke_bytes(DATA, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    exec(code64!(
        "movdqu xmm0, [rsi]",
        "paddw xmm0, xmm0",
        "movdqa [rdi], xmm0",
        "pshufd xmm1, xmm0, 0x1b",
        "movdqa [rdi + 16], xmm1",
        "psrldq xmm1, 4",
        "movups [rdi + 32], xmm1",
        "pmovmskb eax, xmm0",
        "punpcklbw xmm0, xmm1",
        "movdqu [rdi + 48], xmm0"
    ));
    check_bytes("paddw", &bytes(DATA + 64), &[2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32]);
    check_bytes("pshufd", &bytes(DATA + 80), &[26, 28, 30, 32, 18, 20, 22, 24, 10, 12, 14, 16, 2, 4, 6, 8]);
    check_bytes("psrldq", &bytes(DATA + 96), &[18, 20, 22, 24, 10, 12, 14, 16, 2, 4, 6, 8, 0, 0, 0, 0]);
    check_bytes(
        "punpcklbw",
        &bytes(DATA + 112),
        &[2, 18, 4, 20, 6, 22, 8, 24, 10, 10, 12, 12, 14, 14, 16, 16],
    );
    poke(DATA, word(1.5));
    poke(DATA + 8, word(-2.25));
    let end = exec(code64!(
        "movsd xmm0, [rsi]",
        "movsd xmm1, [rsi + 8]",
        "movapd xmm2, xmm0",
        "mulsd xmm2, xmm1",
        "movsd [rdi], xmm2",
        "addsd xmm0, xmm1",
        "movsd [rdi + 8], xmm0",
        "cvtsd2si rax, xmm1",
        "cvttsd2si ecx, xmm1",
        "cvtsi2sd xmm3, rcx",
        "sqrtsd xmm4, [rsi]",
        "movsd [rdi + 16], xmm4",
        "comisd xmm0, xmm1",
        "seta dl",
        "ucomisd xmm1, xmm1",
        "sete bl",
        "cvtsd2ss xmm5, xmm1",
        "movd r8d, xmm5",
        "divsd xmm1, [rsi]",
        "movq r9, xmm1",
        "minsd xmm1, [rsi]",
        "movq r10, xmm1",
        "xorpd xmm6, xmm6",
        "movhpd xmm6, [rsi]",
        "movmskpd r11d, xmm1"
    ));
    check("mulsd", peek(DATA + 64), word(-3.375));
    check("addsd", peek(DATA + 72), word(-0.75));
    check("cvtsd2si", end.rax, (-2i64) as u64);
    check("cvttsd2si", end.rcx, 0xffff_fffe);
    check("sqrtsd", peek(DATA + 80), 0x3ff3_988e_1409_212e);
    check("comisd", end.rdx, 1);
    check("ucomisd", end.rbx, 1);
    check("cvtsd2ss", end.r8, 0xc010_0000);
    check("divsd", end.r9, word(-1.5));
    check("minsd", end.r10, word(-1.5));
    check("movmskpd", end.r11, 1);
    poke(DATA, 0x4000_0000_3f80_0000);
    poke(DATA + 8, 0x4080_0000_4040_0000);
    let end = exec(code64!(
        "movaps xmm0, [rsi]",
        "movaps xmm1, xmm0",
        "mulps xmm0, xmm1",
        "haddps xmm0, xmm0",
        "haddps xmm0, xmm0",
        "movd eax, xmm0",
        "rcpps xmm2, xmm1",
        "shufps xmm1, xmm1, 0xff",
        "movd ecx, xmm1",
        "cmpltps xmm1, [rsi]",
        "movmskps edx, xmm1",
        "cvtps2dq xmm3, [rsi]",
        "movdqa [rdi], xmm3"
    ));
    check("mulps and haddps", end.rax, 0x41f0_0000);
    check("shufps", end.rcx, 0x4080_0000);
    check("cmpltps", end.rdx, 0);
    check("cvtps2dq", peek(DATA + 72), 0x4_0000_0003);
    let end = exec(code64!(
        "mov dword ptr [rdi], 0x7f80",
        "ldmxcsr [rdi]",
        "cvtss2si eax, [rsi + 12]",
        "stmxcsr [rdi + 4]",
        "mov ecx, [rdi + 4]",
        "mov dword ptr [rdi], 0x1f80",
        "ldmxcsr [rdi]"
    ));
    check("ldmxcsr and stmxcsr", end.rcx, 0x7f80);
}

fn bytes(at: u64) -> [u8; 16] {
    core::array::from_fn(|n| peek8(at + n as u64))
}

fn sse4() {
    poke_bytes(DATA, b"hello, world! 12");
    poke_bytes(DATA + 16, b"o!              ");
    let end = exec(code64!(
        "movdqa xmm0, [rsi]",
        "movdqa xmm1, [rsi + 16]",
        "mov eax, 2",
        "mov edx, 16",
        "pcmpestri xmm1, xmm0, 0",
        "mov r8, rcx",
        "pcmpistri xmm1, xmm0, 0x40",
        "mov r9, rcx",
        "pextrb eax, xmm0, 4",
        "pinsrd xmm0, eax, 1",
        "pextrq r10, xmm0, 0",
        "ptest xmm0, xmm0",
        "setz r11b",
        "pmovzxbw xmm2, xmm0",
        "movdqa [rdi], xmm2",
        "pshufb xmm0, xmm0",
        "phaddd xmm1, xmm1",
        "roundsd xmm3, xmm3, 1",
        "pminud xmm2, xmm1",
        "dpps xmm2, xmm2, 0xff",
        "palignr xmm0, xmm1, 4",
        "pcmpgtq xmm0, xmm1",
        "blendvpd xmm1, xmm2, xmm0"
    ));
    check("pcmpestri", end.r8, 4);
    check("pcmpistri", end.r9, 13);
    check("pextrb", end.rax, u64::from(b'o'));
    check("pinsrd and pextrq", end.r10, 0x0000_006f_6c6c_6568);
    check("ptest", end.r11, 0);
    check("pmovzxbw", peek(DATA + 64), 0x006c_006c_0065_0068);
}

unsafe extern "C" fn skip_divide(frame: &mut Frame, _: &mut Block) {
    // divsd xmm0, [rsi + 8]
    frame.rip += 5;
}

fn sse_exceptions() {
    poke(DATA, word(1.0));
    poke(DATA + 8, 0);
    poke(DATA + 16, 0x1d80);
    poke(DATA + 24, 0x1f80);
    let divide = code!("ldmxcsr [rsi + 16]", "movsd xmm0, [rsi]", "divsd xmm0, [rsi + 8]", "int 0xff");
    if !tcg_lacks("an unmasked division by zero") {
        let end = exec(divide);
        check("an unmasked division by zero", end.vector, vector::XM);
        set_handler(vector::XM, Some(skip_divide));
        let end = exec(code64!(
            "ldmxcsr [rsi + 16]",
            "movsd xmm0, [rsi]",
            "divsd xmm0, [rsi + 8]",
            "stmxcsr [rdi]",
            "movq rax, xmm0",
            "ldmxcsr [rsi + 24]"
        ));
        set_handler(vector::XM, None);
        check("leaves the destination", end.rax, word(1.0));
        check("and sets the flag", peek(DATA + 64) & 0x3f, 4);
        let start = Frame { rsi: DATA, ..Frame::kernel(divide) };
        let end = run_controlled(start, cpu::cr0(), cpu::cr4() & !cr4::OSXMMEXCPT);
        check("without CR4.OSXMMEXCPT it is undefined", end.vector, vector::UD);
    }
    exec(code64!("ldmxcsr [rsi + 24]"));
    let end = exec(code64!(
        "movsd xmm0, [rsi]",
        "divsd xmm0, [rsi + 8]",
        "movq rax, xmm0",
        "stmxcsr [rdi]",
        "ldmxcsr [rsi + 24]"
    ));
    check("masked it is infinite", end.rax, word(f64::INFINITY));
    check("masked it sets the flag", peek(DATA + 64) & 0x3f, 4);
    poke(DATA + 16, 0x1_1f80);
    if !tcg_lacks("reserved bits of MXCSR") {
        check("reserved bits of MXCSR", exec(code!("ldmxcsr [rsi + 16]", "int 0xff")).vector, vector::GP);
    }
    let unaligned: [(&str, u64); 4] = [
        ("movaps wants alignment", code!("movaps xmm0, [rsi + 8]", "int 0xff")),
        ("movdqa wants alignment", code!("movdqa [rsi + 1], xmm0", "int 0xff")),
        ("paddb wants alignment", code!("paddb xmm0, [rsi + 4]", "int 0xff")),
        ("movntdq wants alignment", code!("movntdq [rsi + 8], xmm0", "int 0xff")),
    ];
    for (name, code) in unaligned {
        if !tcg_lacks(name) {
            check(name, exec(code).vector, vector::GP);
        }
    }
    check(
        "movups does not",
        exec(code64!("movups xmm0, [rsi + 3]", "movdqu [rdi + 1], xmm0")).vector,
        vector::END,
    );
}

fn save_and_restore() {
    for n in 0..64 {
        poke(DATA + n * 8, n * 0x0101_0101_0101);
    }
    let area = frame(41);
    let end = run(Frame {
        rsi: DATA,
        rdi: area,
        r8: frame(42),
        ..Frame::kernel(code64!(
            "fninit",
            "fldpi",
            "fld1",
            "movdqa xmm0, [rsi + 16]",
            "movdqa xmm7, [rsi + 32]",
            "movdqa xmm15, [rsi + 48]",
            "fxsave64 [rdi]",
            "fninit",
            "xorps xmm0, xmm0",
            "pxor xmm7, xmm7",
            "pxor xmm15, xmm15",
            "fxrstor64 [rdi]",
            "fxsave64 [r8]",
            "fstp qword ptr [rsi]",
            "fstp qword ptr [rsi + 8]"
        ))
    });
    check("fxsave and fxrstor", end.vector, vector::END);
    check("the control word", peek(area) & 0xffff, 0x37f);
    check("the status word", peek(area) >> 16 & 0xffff, 0x3000);
    check("the abridged tag word", peek(area) >> 32 & 0xff, 0xc0);
    check("MXCSR", peek(area + 24) & 0xffff_ffff, 0x1f80);
    check("st(0)", peek(area + 32), 1 << 63);
    check("st(0): exponent", peek(area + 40) & 0xffff, 0x3fff);
    check("st(1)", peek(area + 48), 0xc90f_daa2_2168_c235);
    check("xmm0", peek(area + 160), 2 * 0x0101_0101_0101);
    check("xmm7", peek(area + 160 + 7 * 16), 4 * 0x0101_0101_0101);
    check("xmm15", peek(area + 160 + 15 * 16 + 8), 7 * 0x0101_0101_0101);
    let same = (32..416).step_by(8).all(|n| peek(area + n) == peek(frame(42) + n));
    check_true("restoring and saving again gives the same", same);
    check("and the registers work", peek(DATA), word(1.0));
    check("pi", peek(DATA + 8), 0x4009_21fb_5444_2d18);
    if !tcg_lacks("fxrstor with reserved bits of MXCSR") {
        poke(area + 24, 0xffff_ffff);
        let end = run(Frame { rdi: area, ..Frame::kernel(code!("fxrstor64 [rdi]", "int 0xff")) });
        check("fxrstor with reserved bits of MXCSR", end.vector, vector::GP);
    }
    let end = run(Frame { rdi: area + 8, ..Frame::kernel(code!("fxsave64 [rdi]", "int 0xff")) });
    if !tcg_lacks("fxsave wants alignment") {
        check("fxsave wants alignment", end.vector, vector::GP);
    }
    // The user's and the kernel's view are the same registers.
    exec(code64!("movdqa xmm3, [rsi + 32]"));
    let end = run(Frame {
        rsi: user(DATA),
        ..Frame::user(user(code64!("movq rax, xmm3", "pxor xmm3, xmm3")), user_stack())
    });
    check("registers live through a change of level", end.rax, 4 * 0x0101_0101_0101);
    let end = run(Frame {
        rdi: area,
        ..Frame::kernel(code64!(
            "fninit",
            "fld1",
            "fnsave [rdi]",
            "fnstsw ax",
            "frstor [rdi]",
            "fnstsw [rdi]",
            "fninit"
        ))
    });
    check("fnsave initialises", end.rax & 0xffff, 0);
    check("frstor restores", peek(area) & 0xffff, 0x3800);
}

fn unavailable() {
    let sse = code!("addps xmm0, xmm1", "int 0xff");
    let x87 = code!("fld1", "int 0xff");
    let mmx = code!("paddb mm0, mm1", "int 0xff");
    let wait = code!("fwait", "int 0xff");
    let integer = code!("popcnt eax, ecx", "movnti [rsi], eax", "sfence", "pause", "int 0xff");
    let all = [sse, x87, mmx, wait, integer];
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    let one = |code: u64, cr0: u64, cr4: u64| {
        run_controlled(Frame { rsi: DATA, rdi: DATA + 64, ..Frame::kernel(code) }, cr0, cr4).vector
    };
    let outcomes = |cr0: u64, cr4: u64| all.iter().fold(0, |sum, code| sum << 8 | one(*code, cr0, cr4));
    let (ud, nm, end) = (vector::UD, vector::NM, vector::END);
    let pack = |list: [u64; 5]| list.iter().fold(0, |sum, vector| sum << 8 | vector);
    exec(code64!("fninit"));
    check("SSE, x87, MMX, fwait, integer", outcomes(cr0, cr4), pack([end; 5]));
    exec(code64!("fninit"));
    check("with CR0.TS and MP", outcomes(cr0 | cr0::TS, cr4), pack([nm, nm, nm, nm, end]));
    check("with CR0.TS without MP", outcomes(cr0 & !cr0::MP | cr0::TS, cr4), pack([nm, nm, nm, end, end]));
    check("fxsave with CR0.TS", one(code!("fxsave64 [rdi]", "int 0xff"), cr0 | cr0::TS, cr4), nm);
    check("ldmxcsr with CR0.TS", one(code!("ldmxcsr [rdi]", "int 0xff"), cr0 | cr0::TS, cr4), nm);
    check("with CR0.EM", outcomes(cr0 | cr0::EM, cr4), pack([ud, nm, ud, end, end]));
    check("without CR4.OSFXSR", outcomes(cr0, cr4 & !cr4::OSFXSR), pack([ud, end, end, end, end]));
    exec(code64!("fninit"));
    if cpu::cpuid(1, 0).ecx & 1 << 26 == 0 {
        check(
            "xsave without the feature",
            exec(code!("xor edx, edx", "mov eax, 3", "xsave [rdi]", "int 0xff")).vector,
            ud,
        );
        check("xgetbv without the feature", exec(code!("xor ecx, ecx", "xgetbv", "int 0xff")).vector, ud);
        check("AVX without the feature", exec(code!("vaddps ymm0, ymm1, ymm2", "int 0xff")).vector, ud);
    } else {
        harrier_bare_metal::skip("xsave without the feature", "the processor has it");
    }
}

fn memory_operands() {
    let page = TEST_BASE + 0x10_0000;
    map(page, frame(45) | entry::P | entry::W);
    map(page + 4096, 0);
    poke(frame(45) + 4088, 0x1234);
    let cases: [(&str, u64); 6] = [
        ("movups across into a missing page", code!("movups xmm0, [rsi - 8]", "int 0xff")),
        ("a store of movups across into a missing page", code!("movups [rsi - 8], xmm0", "int 0xff")),
        ("fld across into a missing page", code!("fld tbyte ptr [rsi - 8]", "int 0xff")),
        ("fstp across into a missing page", code!("fninit", "fld1", "fstp tbyte ptr [rsi - 8]", "int 0xff")),
        ("movsd at a missing page", code!("movsd xmm0, [rsi]", "int 0xff")),
        ("fxsave across into a missing page", code!("fxsave64 [rsi - 16]", "int 0xff")),
    ];
    for (name, code) in cases {
        let end = run(Frame { rsi: page + 4096, ..Frame::kernel(code) });
        check(name, end.vector, vector::PF);
        check(name, end.cr2, page + 4096);
    }
    if !tcg_lacks("such a store changes nothing") {
        check("such a store changes nothing", peek(frame(45) + 4088), 0x1234);
    }
    let end = run(Frame { rsi: page + 4096, ..Frame::kernel(code64!("fnstsw ax", "fninit")) });
    check("fstp that faulted did not pop", end.rax >> 11 & 7, 7);
    map(page + 4096, frame(46) | entry::P | entry::W);
    let end = run(Frame {
        rsi: page + 4096,
        rax: 0x1122_3344_5566_7788,
        ..Frame::kernel(code64!(
            "movq xmm0, rax",
            "punpcklqdq xmm0, xmm0",
            "movups [rsi - 5], xmm0",
            "movups xmm1, [rsi - 5]",
            "movq rcx, xmm1",
            "psrldq xmm1, 8",
            "movq rdx, xmm1"
        ))
    });
    check("movups across pages: low", end.rcx, 0x1122_3344_5566_7788);
    check("movups across pages: high", end.rdx, 0x1122_3344_5566_7788);
    // maskmovdqu writes nothing where the mask is clear.
    let end = run(Frame {
        rdi: page + 4096 - 8,
        ..Frame::kernel(code64!(
            "pcmpeqb xmm0, xmm0",
            "movdqa xmm1, xmm0",
            "psrldq xmm1, 12",
            "maskmovdqu xmm0, xmm1",
            "mov rax, [rdi]"
        ))
    });
    check("maskmovdqu", end.rax & 0xffff_ffff, 0xffff_ffff);
}
