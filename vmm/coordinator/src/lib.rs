//! A queue for several hosts: [`serve`] offers a store over HTTP, [`RemoteStore`] is the same store seen from elsewhere.
//!
//! Every method of [`Store`](harrier_jobs::store::Store) is a path, `POST /v1/METHOD`, with its arguments and its answer
//! as JSON; output goes as it is. `GET /metrics` has Prometheus text. Whoever knows the token is a member of the pool and
//! is believed which user and which host it speaks for.
//!
//! A crate of its own because of what it needs: an asynchronous runtime and TLS, which nothing else in Harrier uses.

mod metrics;
mod remote;
mod server;
mod wire;

pub use remote::RemoteStore;
pub use server::{Listen, Options, ServeError, Tls, serve};
