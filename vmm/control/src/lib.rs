//! Running machines as others see them: a name, a state directory, a control socket.
//!
//! One machine is one monitor process, and there is no daemon. What is known about machines lies in a [`Registry`]: a
//! directory with one folder a machine. A machine is alive as long as its monitor holds the folder's lock; the kernel
//! gives the lock back when the process ends, however it ends, so that neither a process id nor a file that was left
//! behind is ever taken for a machine.
//!
//! - [`registry`] finds, creates and removes machines; [`record`] is what is kept about one on disk.
//! - [`seat`] is the monitor's side of a folder: the lock, the socket, the word to whoever started it, the exit record.
//!   [`start`] is the starter's side.
//! - [`api`] has the types on the wire, [`server`] answers requests by calling a [`Machine`], [`client`] sends them.
//!   `resources/control-api.json` describes the API for others.
//! - [`stream`] is what a connection speaks that carries a command's streams (exec, attach); [`exec`] is the machine's side.
//! - [`image`] has the snapshots that clones are made of.
//! - [`output`] keeps what a command prints, with the times, and reads it back.
//!
//! Neighbours: the command line above, which implements [`Machine`] for the machine that it runs. Machines and engines
//! are not known here, nor is the environment: whoever opens a registry says where it is.

pub mod api;
pub mod client;
pub mod exec;
pub mod http;
pub mod image;
pub mod name;
pub mod output;
pub mod record;
pub mod registry;
pub mod routes;
pub mod seat;
pub mod server;
mod socket;
pub mod start;
pub mod stream;
mod time;

pub use api::{ApiError, MachineInfo, MachineState};
pub use client::{Client, ClientError};
pub use image::Image;
pub use name::{MachineId, MachineName};
pub use record::{ExitRecord, MachineRecord};
pub use registry::{Entry, Life, NewMachine, Registry, RegistryError};
pub use routes::Machine;
pub use seat::Seat;
pub use server::Server;
pub use start::{Claim, Handover, MonitorProcess, StartError, Started, Starting};
pub use time::unix_ms;
