//! What the fuzz targets share: reading decisions from the input, a guest around a virtio device,
//! a software processor.

pub mod cpu;
pub mod input;
pub mod sinks;
pub mod virtio;
