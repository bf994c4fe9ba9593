//! The server: every method of the store under a path.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum_server::tls_rustls::RustlsConfig;
use harrier_jobs::protocol::Stream;
use harrier_jobs::queue::{HostAd, LeaseKey};
use harrier_jobs::store::{
    CheckpointPiece, CheckpointQuery, ClaimRequest, EventQuery, FilePiece, JobFilter, OutputQuery, Store,
    StoreError,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::wire::{
    self, Act, CheckpointHead, CheckpointPlace, OfCheckpoint, OfJob, OutputHead, OutputPlace, ReadFile,
    Renew, Reported, Submit,
};

/// The longest body of a request.
const BODY_MAX: usize = 64 << 20;
/// How long requests may go on once the coordinator is told to end.
const GRACE: Duration = Duration::from_secs(5);
/// How often leases that nobody has renewed are ended, should nobody ask for anything.
const SWEEP: Duration = Duration::from_secs(1);

/// Where a coordinator is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// An address and port.
    Tcp(SocketAddr),
    /// A socket in the file system, for this host.
    Unix(PathBuf),
}

/// Certificate chain and private key, in PEM files.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The chain.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// How a coordinator serves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where.
    pub listen: Listen,
    /// With TLS.
    pub tls: Option<Tls>,
    /// What every request has to know.
    pub token: Option<String>,
}

/// Why a coordinator cannot serve.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Others could listen in, or join.
    #[error(
        "'{0}' can be reached from elsewhere, and has no {1}: give {2}, or listen on 127.0.0.1 or a unix socket"
    )]
    Open(SocketAddr, &'static str, &'static str),
    /// The address.
    #[error("'{0}' cannot be listened on ({1}): give another --listen")]
    Bind(String, std::io::Error),
    /// The certificate or key.
    #[error("the TLS certificate or key cannot be used ({0}): give PEM files with --tls-cert and --tls-key")]
    Tls(std::io::Error),
    /// The host.
    #[error("the coordinator cannot run ({0})")]
    Runtime(std::io::Error),
}

/// Serves a store until `stop`, which may block, returns. `ready` hears the address once requests are taken.
pub fn serve(
    store: Arc<dyn Store>,
    options: Options,
    ready: impl FnOnce(&str),
    stop: impl FnOnce() + Send + 'static,
) -> Result<(), ServeError> {
    if let Listen::Tcp(address) = options.listen
        && !address.ip().is_loopback()
    {
        if options.tls.is_none() {
            return Err(ServeError::Open(address, "TLS", "--tls-cert and --tls-key"));
        }
        if options.token.is_none() {
            return Err(ServeError::Open(address, "token", "--token-file"));
        }
    }
    let (stopped, stopping) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("stop".to_owned())
        .spawn(move || {
            stop();
            // A server that has ended by itself needs no telling.
            let _ = stopped.send(());
        })
        .map_err(ServeError::Runtime)?;
    let stopping = async move {
        // A sender that is gone says the same.
        let _ = stopping.await;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    let result = runtime.block_on(serve_async(store, options, ready, stopping));
    // Calls into the store that still run are short.
    runtime.shutdown_timeout(GRACE);
    result
}

async fn serve_async(
    store: Arc<dyn Store>,
    options: Options,
    ready: impl FnOnce(&str),
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let sweeper = tokio::spawn(sweep(store.clone()));
    let app = router(store, options.token.clone());
    let handle = axum_server::Handle::new();
    let stopper = handle.clone();
    let stopping = async move {
        stop.await;
        stopper.graceful_shutdown(Some(GRACE));
    };
    let result = match &options.listen {
        Listen::Unix(path) => {
            let bind = |err| ServeError::Bind(path.display().to_string(), err);
            // A socket that a killed coordinator has left; one that answers is kept.
            if std::os::unix::net::UnixStream::connect(path).is_err() {
                let _ = std::fs::remove_file(path);
            }
            let listener = tokio::net::UnixListener::bind(path).map_err(bind)?;
            ready(&format!("unix:{}", path.display()));
            let served = axum::serve(listener, app.into_make_service()).with_graceful_shutdown(stopping);
            let result = served.await.map_err(bind);
            let _ = std::fs::remove_file(path);
            result
        }
        Listen::Tcp(address) => {
            let bind = |err| ServeError::Bind(address.to_string(), err);
            let listener = std::net::TcpListener::bind(address).map_err(bind)?;
            listener.set_nonblocking(true).map_err(bind)?;
            let bound = listener.local_addr().map_err(bind)?;
            tokio::spawn(stopping);
            match &options.tls {
                Some(tls) => {
                    // The first provider of a process stays; ours is the only one.
                    let _ = rustls::crypto::ring::default_provider().install_default();
                    let config = RustlsConfig::from_pem_file(&tls.certificate, &tls.key)
                        .await
                        .map_err(ServeError::Tls)?;
                    ready(&format!("https://{bound}"));
                    let server = axum_server::from_tcp_rustls(listener, config).map_err(bind)?;
                    server.handle(handle).serve(app.into_make_service()).await.map_err(bind)
                }
                None => {
                    ready(&format!("http://{bound}"));
                    let server = axum_server::from_tcp(listener).map_err(bind)?;
                    server.handle(handle).serve(app.into_make_service()).await.map_err(bind)
                }
            }
        }
    };
    sweeper.abort();
    result
}

/// Looks at the queue now and then, which ends leases that are over.
async fn sweep(store: Arc<dyn Store>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let store = store.clone();
        let looked = tokio::task::spawn_blocking(move || {
            store.jobs(&JobFilter { limit: Some(0), ..JobFilter::default() })
        });
        if let Ok(Err(err)) = looked.await {
            log::warn!("{err}");
        }
    }
}

#[derive(Clone)]
struct App {
    store: Arc<dyn Store>,
    token: Option<Arc<str>>,
}

fn router(store: Arc<dyn Store>, token: Option<String>) -> Router {
    let app = App { store, token: token.map(Arc::from) };
    Router::new()
        .route(
            "/v1/submit",
            post(|app, body| {
                call(app, body, |store, args: Submit| {
                    store.submit(&args.user, args.key.as_deref(), &args.jobs)
                })
            }),
        )
        .route("/v1/jobs", post(|app, body| call(app, body, |store, filter: JobFilter| store.jobs(&filter))))
        .route("/v1/attempts", post(|app, body| call(app, body, |store, of: OfJob| store.attempts(of.job))))
        .route(
            "/v1/events",
            post(|app, body| call(app, body, |store, query: EventQuery| store.events(&query))),
        )
        .route(
            "/v1/dependencies",
            post(|app, body| call(app, body, |store, of: OfJob| store.dependencies(of.job))),
        )
        .route(
            "/v1/act",
            post(|app, body| call(app, body, |store, act: Act| store.act(&act.action, &act.jobs))),
        )
        .route("/v1/hosts", post(|app, body| call(app, body, |store, (): ()| store.hosts())))
        .route("/v1/stats", post(|app, body| call(app, body, |store, (): ()| store.stats())))
        .route("/v1/advertise", post(|app, body| call(app, body, |store, ad: HostAd| store.advertise(&ad))))
        .route(
            "/v1/claim",
            post(|app, body| call(app, body, |store, claim: ClaimRequest| store.claim(&claim))),
        )
        .route(
            "/v1/renew",
            post(|app, body| call(app, body, |store, renew: Renew| store.renew(&renew.host, &renew.keys))),
        )
        .route(
            "/v1/report",
            post(|app, body| {
                call(app, body, |store, reported: Reported| store.report(&reported.key, &reported.report))
            }),
        )
        .route(
            "/v1/checkpoint_files",
            post(|app, body| {
                call(app, body, |store, of: OfCheckpoint| {
                    store.checkpoint_files(&of.key, of.epoch, of.number)
                })
            }),
        )
        .route("/v1/read_checkpoint", post(read_checkpoint))
        .route("/v1/write_checkpoint", post(write_checkpoint))
        .route("/v1/read_file", post(read_file))
        .route("/v1/write_file", post(write_file))
        .route("/v1/read_output", post(read_output))
        .route("/v1/write_output", post(write_output))
        .route("/metrics", get(metrics))
        .fallback(|| async { error(&StoreError::Invalid("there is nothing under this path".to_owned())) })
        .layer(middleware::from_fn_with_state(app.clone(), check_token))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(app)
}

async fn check_token(State(app): State<App>, request: Request, next: Next) -> Response {
    if let Some(token) = &app.token {
        let given =
            request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
        if !same(given, token.as_bytes()) {
            return error(&StoreError::Unauthorized);
        }
    }
    next.run(request).await
}

/// Compares in a time that tells nothing but the lengths.
fn same(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

fn error(error: &StoreError) -> Response {
    let status = StatusCode::from_u16(wire::status(error)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(error).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Runs something on the store, on a thread that may wait for the disk.
async fn blocking<T: Send + 'static>(
    app: App,
    work: impl FnOnce(&dyn Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(move || work(app.store.as_ref()))
        .await
        .unwrap_or_else(|err| Err(StoreError::Failed("coordinator".to_owned(), err.to_string())))
}

async fn call<A, T>(
    State(app): State<App>,
    body: Bytes,
    work: impl FnOnce(&dyn Store, A) -> Result<T, StoreError> + Send + 'static,
) -> Response
where
    A: DeserializeOwned + Send + 'static,
    T: Serialize + Send + 'static,
{
    let args = match serde_json::from_slice::<A>(&body) {
        Ok(args) => args,
        Err(err) => return error(&StoreError::Invalid(format!("the body is not what it should be: {err}"))),
    };
    match blocking(app, move |store| work(store, args)).await {
        Ok(answer) => match serde_json::to_vec(&answer) {
            Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
            Err(err) => error(&StoreError::Invalid(err.to_string())),
        },
        Err(err) => error(&err),
    }
}

async fn read_output(State(app): State<App>, body: Bytes) -> Response {
    let query = match serde_json::from_slice::<OutputQuery>(&body) {
        Ok(query) => query,
        Err(err) => return error(&StoreError::Invalid(format!("the body is not what it should be: {err}"))),
    };
    match blocking(app, move |store| store.read_output(&query)).await {
        Ok(piece) => {
            let head = OutputHead { epoch: piece.epoch, complete: piece.complete };
            let mut body = serde_json::to_vec(&head).unwrap_or_default();
            body.push(b'\n');
            body.extend_from_slice(&piece.bytes);
            ([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response()
        }
        Err(err) => error(&err),
    }
}

async fn write_output(
    State(app): State<App>,
    place: Result<Query<OutputPlace>, QueryRejection>,
    body: Bytes,
) -> Response {
    let Ok(Query(place)) = place else {
        return error(&StoreError::Invalid("the query is not what it should be".to_owned()));
    };
    let key = LeaseKey { job: place.job, epoch: place.epoch, token: place.token };
    let stream = if place.stderr { Stream::Stderr } else { Stream::Stdout };
    match blocking(app, move |store| store.write_output(&key, stream, place.offset, &body)).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(err) => error(&err),
    }
}

async fn read_file(State(app): State<App>, body: Bytes) -> Response {
    let args = match serde_json::from_slice::<ReadFile>(&body) {
        Ok(args) => args,
        Err(err) => return error(&StoreError::Invalid(format!("the body is not what it should be: {err}"))),
    };
    match blocking(app, move |store| store.read_file(&args.sha256, args.offset, args.limit)).await {
        Ok(bytes) => ([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response(),
        Err(err) => error(&err),
    }
}

async fn write_file(
    State(app): State<App>,
    piece: Result<Query<FilePiece>, QueryRejection>,
    body: Bytes,
) -> Response {
    let Ok(Query(piece)) = piece else {
        return error(&StoreError::Invalid("the query is not what it should be".to_owned()));
    };
    match blocking(app, move |store| store.write_file(&piece, &body)).await {
        Ok(complete) => {
            let body = serde_json::to_vec(&complete).unwrap_or_default();
            ([(header::CONTENT_TYPE, "application/json")], body).into_response()
        }
        Err(err) => error(&err),
    }
}

async fn read_checkpoint(State(app): State<App>, body: Bytes) -> Response {
    let query = match serde_json::from_slice::<CheckpointQuery>(&body) {
        Ok(query) => query,
        Err(err) => return error(&StoreError::Invalid(format!("the body is not what it should be: {err}"))),
    };
    match blocking(app, move |store| store.read_checkpoint(&query)).await {
        Ok(data) => {
            let mut body = serde_json::to_vec(&CheckpointHead { offset: data.offset }).unwrap_or_default();
            body.push(b'\n');
            body.extend_from_slice(&data.bytes);
            ([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response()
        }
        Err(err) => error(&err),
    }
}

async fn write_checkpoint(
    State(app): State<App>,
    place: Result<Query<CheckpointPlace>, QueryRejection>,
    body: Bytes,
) -> Response {
    let Ok(Query(place)) = place else {
        return error(&StoreError::Invalid("the query is not what it should be".to_owned()));
    };
    let key = LeaseKey { job: place.job, epoch: place.epoch, token: place.token };
    let piece = CheckpointPiece {
        number: place.number,
        file: place.file,
        offset: place.offset,
        length: place.length,
    };
    match blocking(app, move |store| store.write_checkpoint(&key, &piece, &body)).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(err) => error(&err),
    }
}

async fn metrics(State(app): State<App>) -> Response {
    match blocking(app, |store| store.stats()).await {
        Ok(stats) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], crate::metrics::text(&stats))
            .into_response(),
        Err(err) => error(&err),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_compared_whole() {
        assert!(same(b"abc", b"abc"));
        assert!(!same(b"abc", b"abd") && !same(b"ab", b"abc") && !same(b"", b"a"));
    }
}
