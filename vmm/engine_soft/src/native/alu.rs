//! Integer instructions and their flags, computed by the host's own.
//!
//! Flags travel as [`Flags`], the value that `lahf; seto al` leaves in AX. The flags that a manual leaves
//! undefined come out as this host's processor defines them.
#![expect(unsafe_code, reason = "inline assembly computes the guest's arithmetic")]

use std::arch::asm;

/// The six status flags: OF in bit 0, then SF ZF AF PF CF at their RFLAGS positions plus 8.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Flags(pub(crate) u16);

impl Flags {
    pub(crate) const OF: u16 = 1;
    pub(crate) const CF: u16 = 1 << 8;
    pub(crate) const PF: u16 = 4 << 8;
    pub(crate) const AF: u16 = 0x10 << 8;
    pub(crate) const ZF: u16 = 0x40 << 8;
    pub(crate) const SF: u16 = 0x80 << 8;
    /// The status flags of RFLAGS.
    pub(crate) const MASK: u64 = 0x8d5;

    /// From RFLAGS.
    #[inline(always)]
    pub(crate) fn from_rflags(rflags: u64) -> Flags {
        Flags((((rflags & 0xd5) << 8) | ((rflags >> 11) & 1)) as u16)
    }

    /// The status bits of RFLAGS.
    #[inline(always)]
    pub(crate) fn to_rflags(self) -> u64 {
        (u64::from(self.0 >> 8) & 0xd5) | (u64::from(self.0 & 1) << 11)
    }

    #[inline(always)]
    pub(crate) fn cf(self) -> bool {
        self.0 & Self::CF != 0
    }
    #[inline(always)]
    pub(crate) fn zf(self) -> bool {
        self.0 & Self::ZF != 0
    }
    #[inline(always)]
    pub(crate) fn sf(self) -> bool {
        self.0 & Self::SF != 0
    }
    #[inline(always)]
    pub(crate) fn pf(self) -> bool {
        self.0 & Self::PF != 0
    }
    #[inline(always)]
    pub(crate) fn of(self) -> bool {
        self.0 & Self::OF != 0
    }

    /// Sets or clears the flags of `mask`.
    #[inline(always)]
    pub(crate) fn with(self, mask: u16, on: bool) -> Flags {
        Flags(if on { self.0 | mask } else { self.0 & !mask })
    }

    /// The bits of `other` where `mask` is set, ours elsewhere.
    #[inline(always)]
    pub(crate) fn merge(self, other: Flags, mask: u16) -> Flags {
        Flags((self.0 & !mask) | (other.0 & mask))
    }
}

/// Two-operand arithmetic on one width.
pub(crate) trait Arith: Sized {
    fn add(self, b: Self) -> (Self, Flags);
    fn sub(self, b: Self) -> (Self, Flags);
    fn adc(self, b: Self, f: Flags) -> (Self, Flags);
    fn sbb(self, b: Self, f: Flags) -> (Self, Flags);
    fn and(self, b: Self) -> (Self, Flags);
    fn or(self, b: Self) -> (Self, Flags);
    fn xor(self, b: Self) -> (Self, Flags);
    fn inc(self) -> (Self, Flags);
    fn dec(self) -> (Self, Flags);
    fn neg(self) -> (Self, Flags);
    /// Shifts and rotates; the count is already masked and not zero. Flags that the instruction leaves alone
    /// keep their value from `f`.
    fn shl(self, count: u8, f: Flags) -> (Self, Flags);
    fn shr(self, count: u8, f: Flags) -> (Self, Flags);
    fn sar(self, count: u8, f: Flags) -> (Self, Flags);
    fn rol(self, count: u8, f: Flags) -> (Self, Flags);
    fn ror(self, count: u8, f: Flags) -> (Self, Flags);
    fn rcl(self, count: u8, f: Flags) -> (Self, Flags);
    fn rcr(self, count: u8, f: Flags) -> (Self, Flags);
}

macro_rules! binary {
    ($t:ty, $class:ident, $m:literal, $($name:ident $op:literal),*) => {$(
        #[inline(always)]
        fn $name(self, b: $t) -> ($t, Flags) {
            let mut a = self;
            let f: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!(concat!($op, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout($class) a, b = in($class) b, out("ax") f, options(pure, nomem, nostack));
            }
            (a, Flags(f))
        }
    )*};
}

macro_rules! with_carry {
    ($t:ty, $class:ident, $m:literal, $($name:ident $op:literal),*) => {$(
        #[inline(always)]
        fn $name(self, b: $t, f: Flags) -> ($t, Flags) {
            let mut a = self;
            let f_out: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("bt {f:e}, 8", concat!($op, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout($class) a, b = in($class) b, f = in(reg) u32::from(f.0), out("ax") f_out,
                    options(pure, nomem, nostack));
            }
            (a, Flags(f_out))
        }
    )*};
}

macro_rules! unary {
    ($t:ty, $class:ident, $m:literal, $($name:ident $op:literal),*) => {$(
        #[inline(always)]
        fn $name(self) -> ($t, Flags) {
            let mut a = self;
            let f: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!(concat!($op, " {a", $m, "}"), "lahf", "seto al",
                    a = inout($class) a, out("ax") f, options(pure, nomem, nostack));
            }
            (a, Flags(f))
        }
    )*};
}

macro_rules! by_count {
    ($t:ty, $class:ident, $m:literal, $($name:ident $op:literal),*) => {$(
        #[inline(always)]
        fn $name(self, count: u8, f: Flags) -> ($t, Flags) {
            let mut a = self;
            let f_out: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("add al, 127", "sahf", concat!($op, " {a", $m, "}, cl"), "lahf", "seto al",
                    a = inout($class) a, in("cl") count, inout("ax") f.0 => f_out,
                    options(pure, nomem, nostack));
            }
            (a, Flags(f_out))
        }
    )*};
}

macro_rules! arith {
    ($t:ty, $class:ident, $m:literal) => {
        impl Arith for $t {
            binary!($t, $class, $m, add "add", sub "sub", and "and", or "or", xor "xor");
            with_carry!($t, $class, $m, adc "adc", sbb "sbb");
            unary!($t, $class, $m, inc "inc", dec "dec", neg "neg");
            by_count!($t, $class, $m, shl "shl", shr "shr", sar "sar", rol "rol", ror "ror", rcl "rcl", rcr "rcr");
        }
    };
}

arith!(u8, reg_byte, "");
arith!(u16, reg, ":x");
arith!(u32, reg, ":e");
arith!(u64, reg, ":r");

macro_rules! double_shift {
    ($name:ident, $op:literal, $t:ty, $m:literal) => {
        /// Double-precision shift; the count is masked and not zero.
        #[inline(always)]
        pub(crate) fn $name(a: $t, b: $t, count: u8, f: Flags) -> ($t, Flags) {
            let mut a = a;
            let f_out: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("add al, 127", "sahf", concat!($op, " {a", $m, "}, {b", $m, "}, cl"), "lahf", "seto al",
                    a = inout(reg) a, b = in(reg) b, in("cl") count, inout("ax") f.0 => f_out,
                    options(pure, nomem, nostack));
            }
            (a, Flags(f_out))
        }
    };
}

double_shift!(shld16, "shld", u16, ":x");
double_shift!(shld32, "shld", u32, ":e");
double_shift!(shld64, "shld", u64, ":r");
double_shift!(shrd16, "shrd", u16, ":x");
double_shift!(shrd32, "shrd", u32, ":e");
double_shift!(shrd64, "shrd", u64, ":r");

macro_rules! two_operand {
    ($name:ident, $op:literal, $t:ty, $m:literal) => {
        /// `op a, b` with the flags before as input, for instructions that keep some of them.
        #[inline(always)]
        pub(crate) fn $name(a: $t, b: $t, f: Flags) -> ($t, Flags) {
            let mut a = a;
            let f_out: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("add al, 127", "sahf", concat!($op, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout(reg) a, b = in(reg) b, inout("ax") f.0 => f_out, options(pure, nomem, nostack));
            }
            (a, Flags(f_out))
        }
    };
}

two_operand!(imul16, "imul", u16, ":x");
two_operand!(imul32, "imul", u32, ":e");
two_operand!(imul64, "imul", u64, ":r");
two_operand!(bsf16, "bsf", u16, ":x");
two_operand!(bsf32, "bsf", u32, ":e");
two_operand!(bsf64, "bsf", u64, ":r");
two_operand!(bsr16, "bsr", u16, ":x");
two_operand!(bsr32, "bsr", u32, ":e");
two_operand!(bsr64, "bsr", u64, ":r");
two_operand!(popcnt16, "popcnt", u16, ":x");
two_operand!(popcnt32, "popcnt", u32, ":e");
two_operand!(popcnt64, "popcnt", u64, ":r");
two_operand!(tzcnt16, "tzcnt", u16, ":x");
two_operand!(tzcnt32, "tzcnt", u32, ":e");
two_operand!(tzcnt64, "tzcnt", u64, ":r");
two_operand!(lzcnt16, "lzcnt", u16, ":x");
two_operand!(lzcnt32, "lzcnt", u32, ":e");
two_operand!(lzcnt64, "lzcnt", u64, ":r");
two_operand!(bt16, "bt", u16, ":x");
two_operand!(bt32, "bt", u32, ":e");
two_operand!(bt64, "bt", u64, ":r");
two_operand!(bts16, "bts", u16, ":x");
two_operand!(bts32, "bts", u32, ":e");
two_operand!(bts64, "bts", u64, ":r");
two_operand!(btr16, "btr", u16, ":x");
two_operand!(btr32, "btr", u32, ":e");
two_operand!(btr64, "btr", u64, ":r");
two_operand!(btc16, "btc", u16, ":x");
two_operand!(btc32, "btc", u32, ":e");
two_operand!(btc64, "btc", u64, ":r");

macro_rules! wide_multiply {
    ($name:ident, $op:literal, $t:ty, $m:literal, $a:tt, $d:tt) => {
        /// Low half, high half and flags of a widening multiplication.
        #[inline(always)]
        pub(crate) fn $name(a: $t, b: $t, f: Flags) -> ($t, $t, Flags) {
            let (mut low, high) = (a, 0);
            let mut high: $t = high;
            let mut f_io = u64::from(f.0);
            // SAFETY: register arithmetic only; RAX is parked while the flags are loaded and read.
            unsafe {
                asm!("xchg rax, {f}", "add al, 127", "sahf", "xchg rax, {f}",
                    concat!($op, " {b", $m, "}"),
                    "xchg rax, {f}", "lahf", "seto al", "xchg rax, {f}",
                    f = inout(reg) f_io, b = in(reg) b, inout($a) low, inout($d) high,
                    options(pure, nomem, nostack));
            }
            (low, high, Flags(f_io as u16))
        }
    };
}

wide_multiply!(mul16, "mul", u16, ":x", "ax", "dx");
wide_multiply!(mul32, "mul", u32, ":e", "eax", "edx");
wide_multiply!(mul64, "mul", u64, ":r", "rax", "rdx");
wide_multiply!(imul_wide16, "imul", u16, ":x", "ax", "dx");
wide_multiply!(imul_wide32, "imul", u32, ":e", "eax", "edx");
wide_multiply!(imul_wide64, "imul", u64, ":r", "rax", "rdx");

/// MUL and IMUL of bytes: the 16-bit product in AX.
#[inline(always)]
pub(crate) fn mul8(a: u8, b: u8, signed: bool, f: Flags) -> (u16, Flags) {
    let product =
        if signed { (i16::from(a as i8) * i16::from(b as i8)) as u16 } else { u16::from(a) * u16::from(b) };
    // The same width of flags as the wider forms: CF and OF say whether the upper half matters.
    let wide = if signed { product as i16 != i16::from(product as i8) } else { product > 0xff };
    (product, f.with(Flags::CF | Flags::OF, wide))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_survive_the_way_through_rflags() {
        for bits in 0..64u64 {
            let rflags = (bits & 1)
                | (bits & 2) << 1
                | (bits & 4) << 2
                | (bits & 8) << 3
                | (bits & 16) << 3
                | (bits & 32) << 6;
            assert_eq!(Flags::from_rflags(rflags).to_rflags(), rflags);
        }
    }

    #[test]
    fn arithmetic_has_the_processors_flags() {
        let (r, f) = 0x7fu8.add(1);
        assert_eq!((r, f.of(), f.sf(), f.cf(), f.zf()), (0x80, true, true, false, false));
        let (r, f) = 0u32.sub(1);
        assert_eq!((r, f.of(), f.sf(), f.cf(), f.zf()), (u32::MAX, false, true, true, false));
        let (r, f) = u64::MAX.adc(0, Flags(Flags::CF));
        assert_eq!((r, f.cf(), f.zf()), (0, true, true));
        let (r, f) = 0x8001u16.rol(1, Flags(Flags::ZF));
        assert_eq!((r, f.cf(), f.zf()), (3, true, true));
        let (r, f) = 1u8.rcr(1, Flags(0));
        assert_eq!((r, f.cf()), (0, true));
        let (low, high, f) = mul64(u64::MAX, 2, Flags(0));
        assert_eq!((low, high, f.cf(), f.of()), (u64::MAX - 1, 1, true, true));
        let (r, f) = mul8(0x80, 0xff, true, Flags(0));
        assert_eq!((r, f.cf()), (0x80, true));
    }
}
