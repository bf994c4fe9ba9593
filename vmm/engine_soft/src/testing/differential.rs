//! General-purpose instructions against the processor that the test runs on: every encoding that the decoder
//! knows for a list of mnemonics, with random registers, flags, immediates and memory.
#![expect(unsafe_code, reason = "runs generated machine code")]
