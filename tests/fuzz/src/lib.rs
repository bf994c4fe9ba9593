//! What the fuzz targets share: reading decisions from the input, and a guest around a virtio device.

pub mod input;
pub mod sinks;
pub mod virtio;
