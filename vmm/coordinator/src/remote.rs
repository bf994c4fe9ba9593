//! The client: a store that is elsewhere.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use harrier_control::http::read_response;
use harrier_control::server::Timed;
use harrier_jobs::files::Sha256Digest;
use harrier_jobs::protocol::Stream;
use harrier_jobs::queue::{Attempt, Dependency, Event, Host, HostAd, Job, JobId, LeaseKey, NewJob};
use harrier_jobs::store::checkpoints::check_name;
use harrier_jobs::store::{
    Action, ActionResult, CheckpointData, CheckpointFile, CheckpointPiece, CheckpointQuery, Claim,
    ClaimRequest, EventQuery, FilePiece, JobFilter, LEASE_MS, OutputPiece, OutputQuery, Renewal, Report,
    Result, Stats, Store, StoreError,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::wire::{
    Act, CheckpointHead, OfCheckpoint, OfJob, OutputHead, OutputPlace, ReadFile, Renew, Reported, Submit,
};

/// How long a worker waits for an answer at most, and which part of a lease that may be: it has to be able to let its jobs
/// stand still in time.
const WORKER_TIMEOUT: Duration = Duration::from_secs(5);
const LEASE_SHARE: u32 = 6;
/// How long nobody asks again after a call without an answer: at first and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(4));
/// How long a piece of a checkpoint may take. Other threads keep the leases meanwhile.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a user's command waits.
const USER_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest answer that is taken.
const ANSWER_MAX: u64 = 512 << 20;

/// A coordinator's store.
pub struct RemoteStore {
    name: String,
    way: Way,
    token: Option<String>,
    /// The leases that it hands out, in milliseconds.
    lease_ms: AtomicU64,
    silence: Mutex<Option<Silence>>,
}

/// A worker's calls are not answered: those that follow fail at once for a while, so that none of its threads waits for
/// one time-out after the other.
#[derive(Clone, Debug)]
struct Silence {
    until: Instant,
    wait: Duration,
    reason: String,
}

enum Way {
    Http { agent: Agent, base: String },
    Unix(PathBuf),
}

struct Answer {
    status: u16,
    body: Vec<u8>,
}

impl RemoteStore {
    /// For `http://HOST:PORT`, `https://HOST:PORT` or `unix:PATH`; `ca` has PEM certificates to trust besides nothing else,
    /// instead of the usual ones.
    pub fn new(url: &str, token: Option<String>, ca: Option<&[u8]>) -> Result<Self> {
        let way = if let Some(path) = url.strip_prefix("unix:") {
            Way::Unix(PathBuf::from(path))
        } else {
            // The first provider of a process stays; ours is the only one.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let mut config = Agent::config_builder()
                .http_status_as_error(false)
                .timeout_connect(Some(Duration::from_secs(3)))
                .proxy(None);
            if let Some(pem) = ca {
                let certificate = Certificate::from_pem(pem).map_err(|err| {
                    StoreError::Invalid(format!("the CA file is no PEM certificate: {err}"))
                })?;
                let tls = TlsConfig::builder().root_certs(RootCerts::new_with_certs(&[certificate])).build();
                config = config.tls_config(tls);
            }
            Way::Http { agent: config.build().into(), base: url.trim_end_matches('/').to_owned() }
        };
        let name = url.to_owned();
        let lease_ms = AtomicU64::new(LEASE_MS);
        Ok(Self { name, way, token, lease_ms, silence: Mutex::new(None) })
    }

    fn unreachable(&self, err: impl std::fmt::Display) -> StoreError {
        StoreError::Unreachable(self.name.clone(), err.to_string())
    }

    /// Why a request over TCP got no answer.
    fn failed(&self, reason: &str) -> StoreError {
        let Some((_, wrong)) = reason.split_once("invalid peer certificate: ") else {
            return self.unreachable(reason);
        };
        let wrong = if wrong.contains("CaUsedAsEndEntity") {
            "its certificate is one for signing others: it has to be made with basicConstraints CA:FALSE"
        } else {
            wrong
        };
        StoreError::Certificate(self.name.clone(), wrong.to_owned())
    }

    fn post(&self, path: &str, body: &[u8], timeout: Duration) -> Result<Answer> {
        let answer = match &self.way {
            Way::Http { agent, base } => self.post_http(agent, &format!("{base}{path}"), body, timeout)?,
            Way::Unix(socket) => post_unix(socket, path, body, self.token.as_deref(), timeout)
                .map_err(|err| self.unreachable(err))?,
        };
        if (200..300).contains(&answer.status) {
            return Ok(answer);
        }
        let error = serde_json::from_slice::<StoreError>(&answer.body);
        Err(error.unwrap_or_else(|_| self.unreachable(format!("it answers with status {}", answer.status))))
    }

    fn post_http(&self, agent: &Agent, url: &str, body: &[u8], timeout: Duration) -> Result<Answer> {
        let mut request = agent.post(url).config().timeout_global(Some(timeout)).build();
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut response = request.send(body).map_err(|err| self.failed(&err.to_string()))?;
        let status = response.status().as_u16();
        let body = response
            .body_mut()
            .with_config()
            .limit(ANSWER_MAX)
            .read_to_vec()
            .map_err(|err| self.unreachable(err))?;
        Ok(Answer { status, body })
    }

    /// How long a worker's call may take.
    fn worker_timeout(&self) -> Duration {
        let lease = Duration::from_millis(self.lease_ms.load(Ordering::Relaxed));
        (lease / LEASE_SHARE).clamp(Duration::from_millis(100), WORKER_TIMEOUT)
    }

    /// A worker's call: nobody waits for a coordinator that has just been found silent.
    fn worker_post(&self, path: &str, body: &[u8], timeout: Duration) -> Result<Answer> {
        let mut silence = self.silence.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = silence.as_ref()
            && known.until > Instant::now()
        {
            return Err(self.unreachable(&known.reason));
        }
        drop(silence);
        let answer = self.post(path, body, timeout);
        silence = self.silence.lock().unwrap_or_else(PoisonError::into_inner);
        match &answer {
            Err(StoreError::Unreachable(_, reason) | StoreError::Certificate(_, reason)) => {
                let wait = silence.as_ref().map_or(BACK_OFF.0, |known| (known.wait * 2).min(BACK_OFF.1));
                // With the call before it, it leaves a machine that stands still for the last third of its lease time to go on.
                let wait = wait.min(timeout / 4);
                *silence = Some(Silence { until: Instant::now() + wait, wait, reason: reason.clone() });
            }
            _ => *silence = None,
        }
        answer
    }

    fn worker_call<T: DeserializeOwned>(&self, method: &str, args: &impl Serialize) -> Result<T> {
        let body = serde_json::to_vec(args).map_err(|err| StoreError::Invalid(err.to_string()))?;
        let answer = self.worker_post(&format!("/v1/{method}"), &body, self.worker_timeout())?;
        self.understand(&answer)
    }

    fn understand<T: DeserializeOwned>(&self, answer: &Answer) -> Result<T> {
        serde_json::from_slice(&answer.body).map_err(|err| {
            self.unreachable(format!(
                "its answer is not understood: {err}; is it another version of harrier?"
            ))
        })
    }

    /// An answer that is a line of JSON with bytes behind it.
    fn head_and_bytes<T: DeserializeOwned>(&self, answer: &Answer) -> Result<(T, Vec<u8>)> {
        let end = answer.body.iter().position(|byte| *byte == b'\n').unwrap_or(0);
        let head = serde_json::from_slice(answer.body.get(..end).unwrap_or_default())
            .map_err(|err| self.unreachable(format!("its answer is not understood: {err}")))?;
        Ok((head, answer.body.get(end + 1..).unwrap_or_default().to_vec()))
    }

    fn call<T: DeserializeOwned>(&self, method: &str, args: &impl Serialize, timeout: Duration) -> Result<T> {
        let body = serde_json::to_vec(args).map_err(|err| StoreError::Invalid(err.to_string()))?;
        let answer = self.post(&format!("/v1/{method}"), &body, timeout)?;
        self.understand(&answer)
    }
}

/// One request over a socket of this host.
fn post_unix(
    socket: &std::path::Path,
    path: &str,
    body: &[u8],
    token: Option<&str>,
    timeout: Duration,
) -> io::Result<Answer> {
    let mut stream = Timed::connect(socket, timeout)?;
    let authorization = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: harrier\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         {authorization}Connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let response = read_response(&mut stream).map_err(io::Error::other)?;
    Ok(Answer { status: response.status, body: response.body })
}

impl Store for RemoteStore {
    fn submit(&self, user: &str, key: Option<&str>, jobs: &[NewJob]) -> Result<Vec<JobId>> {
        let args = Submit { user: user.to_owned(), key: key.map(str::to_owned), jobs: jobs.to_vec() };
        self.call("submit", &args, USER_TIMEOUT)
    }

    fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>> {
        self.call("jobs", filter, USER_TIMEOUT)
    }

    fn attempts(&self, job: JobId) -> Result<Vec<Attempt>> {
        self.call("attempts", &OfJob { job }, USER_TIMEOUT)
    }

    fn events(&self, query: &EventQuery) -> Result<Vec<Event>> {
        self.call("events", query, USER_TIMEOUT)
    }

    fn dependencies(&self, job: JobId) -> Result<Vec<Dependency>> {
        self.call("dependencies", &OfJob { job }, USER_TIMEOUT)
    }

    fn act(&self, action: &Action, jobs: &[JobId]) -> Result<Vec<ActionResult>> {
        self.call("act", &Act { action: action.clone(), jobs: jobs.to_vec() }, USER_TIMEOUT)
    }

    fn hosts(&self) -> Result<Vec<Host>> {
        self.call("hosts", &(), USER_TIMEOUT)
    }

    fn stats(&self) -> Result<Stats> {
        self.call("stats", &(), USER_TIMEOUT)
    }

    fn advertise(&self, ad: &HostAd) -> Result<()> {
        self.worker_call("advertise", ad)
    }

    fn claim(&self, request: &ClaimRequest) -> Result<Vec<Claim>> {
        let claims: Vec<Claim> = self.worker_call("claim", request)?;
        if let Some(claim) = claims.first() {
            self.lease_ms.store(claim.lease_ms, Ordering::Relaxed);
        }
        Ok(claims)
    }

    fn renew(&self, host: &str, keys: &[LeaseKey]) -> Result<Vec<Renewal>> {
        let renewals: Vec<Renewal> =
            self.worker_call("renew", &Renew { host: host.to_owned(), keys: keys.to_vec() })?;
        if let Some(lease) = renewals.iter().find_map(|renewal| renewal.lease) {
            self.lease_ms.store(lease.lease_ms, Ordering::Relaxed);
        }
        Ok(renewals)
    }

    fn report(&self, key: &LeaseKey, report: &Report) -> Result<()> {
        self.worker_call("report", &Reported { key: key.clone(), report: report.clone() })
    }

    fn read_output(&self, query: &OutputQuery) -> Result<OutputPiece> {
        let body = serde_json::to_vec(query).map_err(|err| StoreError::Invalid(err.to_string()))?;
        let answer = self.post("/v1/read_output", &body, USER_TIMEOUT)?;
        let (head, bytes): (OutputHead, _) = self.head_and_bytes(&answer)?;
        Ok(OutputPiece { epoch: head.epoch, bytes, complete: head.complete })
    }

    fn write_output(&self, key: &LeaseKey, stream: Stream, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = OutputPlace {
            job: key.job,
            epoch: key.epoch,
            token: key.token.clone(),
            stderr: stream == Stream::Stderr,
            offset,
        };
        // Numbers and hexadecimal digits: nothing to escape, as long as the token is one of ours.
        let token: String = place.token.chars().filter(char::is_ascii_alphanumeric).collect();
        let path = format!(
            "/v1/write_output?job={}&epoch={}&token={token}&stderr={}&offset={}",
            place.job, place.epoch, place.stderr, place.offset
        );
        self.worker_post(&path, bytes, self.worker_timeout()).map(drop)
    }

    fn local_output(&self, _key: &LeaseKey) -> Option<[PathBuf; 2]> {
        None
    }

    fn local_checkpoint(&self, _job: JobId, _epoch: u64, _number: u32) -> Option<PathBuf> {
        None
    }

    fn write_checkpoint(&self, key: &LeaseKey, piece: &CheckpointPiece, bytes: &[u8]) -> Result<()> {
        check_name(&piece.file)?;
        let token: String = key.token.chars().filter(char::is_ascii_alphanumeric).collect();
        let path = format!(
            "/v1/write_checkpoint?job={}&epoch={}&token={token}&number={}&file={}&offset={}&length={}",
            key.job, key.epoch, piece.number, piece.file, piece.offset, piece.length
        );
        self.worker_post(&path, bytes, TRANSFER_TIMEOUT).map(drop)
    }

    fn checkpoint_files(&self, key: &LeaseKey, epoch: u64, number: u32) -> Result<Vec<CheckpointFile>> {
        self.worker_call("checkpoint_files", &OfCheckpoint { key: key.clone(), epoch, number })
    }

    fn write_file(&self, piece: &FilePiece, bytes: &[u8]) -> Result<bool> {
        let FilePiece { sha256, bytes: length, offset } = piece;
        let path = format!("/v1/write_file?sha256={sha256}&bytes={length}&offset={offset}");
        self.understand(&self.post(&path, bytes, TRANSFER_TIMEOUT)?)
    }

    fn read_file(&self, sha256: &Sha256Digest, offset: u64, limit: u64) -> Result<Vec<u8>> {
        let args = ReadFile { sha256: *sha256, offset, limit };
        let body = serde_json::to_vec(&args).map_err(|err| StoreError::Invalid(err.to_string()))?;
        Ok(self.post("/v1/read_file", &body, TRANSFER_TIMEOUT)?.body)
    }

    fn local_file(&self, _sha256: &Sha256Digest) -> Option<PathBuf> {
        None
    }

    fn read_checkpoint(&self, query: &CheckpointQuery) -> Result<CheckpointData> {
        let body = serde_json::to_vec(query).map_err(|err| StoreError::Invalid(err.to_string()))?;
        let answer = self.worker_post("/v1/read_checkpoint", &body, TRANSFER_TIMEOUT)?;
        let (head, bytes): (CheckpointHead, _) = self.head_and_bytes(&answer)?;
        Ok(CheckpointData { offset: head.offset, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_is_not_accepted_is_told_with_what_helps() {
        let store = RemoteStore::new("https://pool:1", None, None).unwrap();
        let told = |reason: &str| store.failed(reason).to_string();
        let of_an_authority = told("io: invalid peer certificate: Other(OtherError(CaUsedAsEndEntity))");
        assert!(of_an_authority.contains("basicConstraints CA:FALSE"), "{of_an_authority}");
        let stranger = told("io: invalid peer certificate: UnknownIssuer");
        assert!(stranger.contains("(UnknownIssuer): give") && stranger.contains("--ca-file"), "{stranger}");
        assert!(told("io: Connection refused").contains("is 'harrier coordinator' running there?"));
    }

    #[test]
    fn who_finds_it_silent_asks_again_before_the_last_third_of_a_lease_is_over() {
        // Nobody listens there.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let store = RemoteStore::new(&format!("http://{address}"), None, None).unwrap();
        let lease = Duration::from_millis(600);
        store.lease_ms.store(600, Ordering::Relaxed);
        for _ in 0..4 {
            assert!(store.worker_post("/v1/renew", b"{}", store.worker_timeout()).is_err());
            let wait = store.silence.lock().unwrap().as_ref().unwrap().wait;
            // A call that has just begun, the wait behind it, and the call that is answered.
            assert!(store.worker_timeout() + 2 * wait < lease / 3, "{wait:?}");
            std::thread::sleep(wait);
        }
    }
}
