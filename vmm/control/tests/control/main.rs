//! The registry, the control socket and the kept output, as a monitor and its clients use them.

mod api;
mod hostile;
mod output;
mod registry;
mod streams;
mod support;
