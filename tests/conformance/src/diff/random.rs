//! Random numbers that often are special ones.

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", 2016).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        // Zero would stay zero.
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.next();
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 8) % end
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer at an edge more often than chance gives.
    pub(crate) fn value(&mut self) -> u64 {
        let raw = self.next();
        match self.below(8) {
            0 => raw & 1,
            1 => u64::MAX << (raw % 64),
            2 => 1 << (raw % 64),
            3 => (1u64 << (raw % 64)).wrapping_sub(1),
            4 => (raw as i8) as u64,
            5 => raw & 0x7fff_ffff,
            _ => raw,
        }
    }

    fn single(&mut self) -> u32 {
        let raw = self.next() as u32;
        let sign = raw & 0x8000_0000;
        match self.below(12) {
            0 => sign,
            1 => sign | 0x7f80_0000,
            2 => sign | 0x7fc0_0000 | raw & 0xffff,
            3 => sign | 0x7f80_0001 | raw & 0xffff,
            4 => sign | raw & 0x007f_ffff,
            5 => sign | 0x0080_0000 | raw & 0xff,
            6 => sign | 0x7f7f_ff00 | raw & 0xff,
            7 => sign | 0x3f80_0000,
            8 => (f32::from(raw as i16) * 0.5).to_bits(),
            9 => (raw as i32 as f32).to_bits(),
            10 => sign | (0x2f80_0000 + ((raw & 0x3f) << 23)) | raw >> 8 & 0x7f_ffff,
            _ => raw,
        }
    }

    fn double(&mut self) -> u64 {
        let raw = self.next();
        let sign = raw & 1 << 63;
        match self.below(12) {
            0 => sign,
            1 => sign | 0x7ff0 << 48,
            2 => sign | 0x7ff8 << 48 | raw & 0xffff,
            3 => sign | 0x7ff0 << 48 | 1 | raw & 0xffff,
            4 => sign | raw & 0xf_ffff_ffff_ffff,
            5 => sign | 0x0010 << 48 | raw & 0xff,
            6 => sign | 0x7fef_ffff_ffff_ff00 | raw & 0xff,
            7 => sign | 0x3ff0 << 48,
            8 => (f64::from(raw as i16) * 0.5).to_bits(),
            9 => (raw as i64 as f64).to_bits(),
            10 => (f64::from(raw as i32) * 1.000_000_1).to_bits(),
            _ => raw,
        }
    }

    /// Eight bytes that mean something in one of the formats.
    pub(crate) fn word(&mut self) -> u64 {
        match self.below(4) {
            0 => u64::from(self.single()) | u64::from(self.single()) << 32,
            1 => self.double(),
            2 => self.pick(&[0, 1, u64::MAX, 0x8000_0000_8000_0000, 0x7fff_8000_ff00_80ff, 1 << 63]),
            _ => self.next(),
        }
    }

    /// 80-bit values: normal and every special kind.
    pub(crate) fn extended(&mut self) -> [u8; 10] {
        let raw = self.next();
        let mantissa = raw | 1 << 63;
        let (exponent, mantissa) = match self.below(12) {
            0 => (0, 0),
            1 => (0x7fff, 1 << 63),
            2 => (0x7fff, mantissa | 1 << 62),
            3 => (0x7fff, mantissa & !(1 << 62)),
            4 => (0, raw >> 1),
            5 => (raw as u16 & 0x7fff, raw >> 1),
            6 => (0x3fff, 1 << 63),
            7 => (0x3fff + (raw as u16 & 63), (raw | 1 << 63) & !0xffff_ffff),
            8 => (0x7ffe, mantissa),
            9 => (0x3fff - 16 + (raw as u16 & 31), mantissa),
            10 => (1, mantissa),
            _ => (raw as u16 & 0x7fff, mantissa),
        };
        let mut value = [0; 10];
        value[..8].copy_from_slice(&mantissa.to_le_bytes());
        value[8..].copy_from_slice(&(exponent | (self.next() as u16 & 0x8000)).to_le_bytes());
        value
    }

    /// Bytes for memory.
    pub(crate) fn data(&mut self, len: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(len + 10);
        while data.len() < len {
            if self.one_in(3) {
                data.extend(self.extended());
            } else {
                data.extend(self.word().to_le_bytes());
            }
        }
        data.truncate(len);
        data
    }
}
