//! HTTP/1.1 (RFC 9112) as far as the control socket speaks it: one request a connection, bodies with a length, small
//! bounds on everything. httparse knows the grammar.

use std::io::{self, Read, Write};

use serde::Serialize;
use thiserror::Error;

use crate::api::{ApiError, ErrorBody};

/// Longest request or status line with its headers, in bytes.
pub const HEAD_MAX: usize = 8 << 10;
/// Most headers.
pub const HEADERS_MAX: usize = 32;
/// Longest body of a request, in bytes.
pub const REQUEST_BODY_MAX: usize = 1 << 20;
/// Longest body of a response, in bytes.
pub const RESPONSE_BODY_MAX: usize = 16 << 20;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// As it came: upper case for the known ones.
    pub method: String,
    /// The path without what follows a `?`.
    pub path: String,
    /// What the client wants to speak after the answer, from its `Upgrade` header.
    pub upgrade: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

/// Why there is no request, or no response.
#[derive(Debug, Error)]
pub enum HttpError {
    /// The other side said nothing.
    #[error("the connection was closed")]
    Closed,
    /// The connection.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// It is not HTTP/1.
    #[error("this is not HTTP/1.1: {0}")]
    Syntax(String),
    /// The head exceeds [`HEAD_MAX`] or [`HEADERS_MAX`].
    #[error("the head is longer than {HEAD_MAX} bytes or {HEADERS_MAX} headers")]
    HeadTooLong,
    /// The body exceeds its maximum.
    #[error("a body of {0} bytes is too long: at most {1} are taken")]
    BodyTooLong(u64, usize),
    /// The body has no length.
    #[error("the body has no length: send it with Content-Length")]
    NoLength,
}

impl HttpError {
    /// What a server answers; `None` where nobody listens any more.
    #[must_use]
    pub fn answer(&self) -> Option<ApiError> {
        let status = match self {
            Self::Closed => return None,
            Self::Io(err) if matches!(err.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                return Some(ApiError {
                    status: 408,
                    message: "the request did not come in time".to_owned(),
                });
            }
            Self::Io(_) => return None,
            Self::Syntax(_) => 400,
            Self::HeadTooLong => 431,
            Self::BodyTooLong(..) => 413,
            Self::NoLength => 411,
        };
        Some(ApiError { status, message: self.to_string() })
    }
}

/// What the headers say about the rest.
#[derive(Default)]
struct Framing {
    length: Option<u64>,
    chunked: bool,
    upgrade: Option<String>,
}

impl Framing {
    fn of(headers: &[httparse::Header<'_>]) -> Result<Self, HttpError> {
        let mut framing = Self::default();
        for header in headers {
            let text = || String::from_utf8_lossy(header.value).trim().to_owned();
            if header.name.eq_ignore_ascii_case("content-length") {
                let length = text().parse().ok().filter(|_| header.value.iter().all(u8::is_ascii_digit));
                let length =
                    length.ok_or_else(|| HttpError::Syntax(format!("Content-Length '{}'", text())))?;
                if framing.length.is_some_and(|other| other != length) {
                    return Err(HttpError::Syntax("two lengths".to_owned()));
                }
                framing.length = Some(length);
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                framing.chunked = true;
            } else if header.name.eq_ignore_ascii_case("upgrade") {
                framing.upgrade = Some(text());
            }
        }
        Ok(framing)
    }
}

/// Reads until `parse` finds the end of the head; answers what it made of it, and the bytes after it.
fn read_head<T>(
    input: &mut impl Read,
    mut parse: impl FnMut(&[u8]) -> Result<Option<(T, usize)>, HttpError>,
) -> Result<(T, Vec<u8>), HttpError> {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    loop {
        let count = match input.read(&mut piece) {
            Ok(0) if head.is_empty() => return Err(HttpError::Closed),
            Ok(0) => return Err(HttpError::Syntax("it ends in the middle".to_owned())),
            Ok(count) => count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(err.into()),
        };
        head.extend_from_slice(piece.get(..count).unwrap_or_default());
        if let Some((result, end)) = parse(&head)? {
            return Ok((result, head.split_off(end.min(head.len()))));
        }
        if head.len() > HEAD_MAX {
            return Err(HttpError::HeadTooLong);
        }
    }
}

fn syntax(error: httparse::Error) -> HttpError {
    match error {
        httparse::Error::TooManyHeaders => HttpError::HeadTooLong,
        other => HttpError::Syntax(other.to_string()),
    }
}

/// Reads the rest of a body whose beginning has come with the head.
fn read_body(
    input: &mut impl Read,
    mut body: Vec<u8>,
    length: u64,
    max: usize,
) -> Result<Vec<u8>, HttpError> {
    let length = usize::try_from(length).ok().filter(|length| *length <= max);
    let length = length.ok_or(HttpError::BodyTooLong(u64::MAX, max))?;
    body.truncate(length);
    let mut piece = [0; 4096];
    while body.len() < length {
        let room = piece.len().min(length - body.len());
        match input.read(piece.get_mut(..room).unwrap_or_default()) {
            Ok(0) => return Err(HttpError::Syntax("its body ends in the middle".to_owned())),
            Ok(count) => body.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err.into()),
        }
    }
    Ok(body)
}

/// Reads one request.
///
/// # Errors
/// [`HttpError`], for which [`HttpError::answer`] has an answer.
pub fn read_request(input: &mut impl Read) -> Result<Request, HttpError> {
    let ((method, path, framing), rest) = read_head(input, |head| {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut parsed = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(end) = parsed.parse(head).map_err(syntax)? else { return Ok(None) };
        let target = parsed.path.unwrap_or_default();
        let path = target.split(['?', '#']).next().unwrap_or_default().to_owned();
        let method = parsed.method.unwrap_or_default().to_owned();
        Ok(Some(((method, path, Framing::of(parsed.headers)?), end)))
    })?;
    if framing.chunked {
        return Err(HttpError::NoLength);
    }
    let length = framing.length.unwrap_or(0);
    if length > REQUEST_BODY_MAX as u64 {
        return Err(HttpError::BodyTooLong(length, REQUEST_BODY_MAX));
    }
    let body = read_body(input, rest, length, REQUEST_BODY_MAX)?;
    Ok(Request { method, path, upgrade: framing.upgrade, body })
}

/// A response: a status and a JSON body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// JSON.
    pub body: Vec<u8>,
    /// A header that belongs to the status: name and value.
    pub header: Option<(&'static str, &'static str)>,
}

impl Response {
    /// Status 200 with an object.
    pub fn ok(object: &impl Serialize) -> Self {
        Self::new(200, object)
    }

    /// A status with an object.
    pub fn new(status: u16, object: &impl Serialize) -> Self {
        match serde_json::to_vec(object) {
            Ok(body) => Self { status, body, header: None },
            Err(err) => Self::error(&ApiError::internal(format!("the answer cannot be written: {err}"))),
        }
    }

    /// What an error looks like.
    #[must_use]
    pub fn error(error: &ApiError) -> Self {
        let body = ErrorBody { error: error.message.clone() };
        Self { status: error.status, body: serde_json::to_vec(&body).unwrap_or_default(), header: None }
    }

    /// The answer after which the connection speaks another protocol (RFC 9110, section 7.8).
    ///
    /// # Errors
    /// The connection's.
    pub fn write_switching(protocol: &str, output: &mut impl Write) -> io::Result<()> {
        let text =
            format!("HTTP/1.1 101 {}\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n", reason(101));
        output.write_all(text.as_bytes())
    }

    /// Writes it; the connection ends with it.
    ///
    /// # Errors
    /// The connection's.
    pub fn write(&self, output: &mut impl Write) -> io::Result<()> {
        let mut text = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        if let Some((name, value)) = self.header {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.body.len()
        ));
        let mut bytes = text.into_bytes();
        bytes.extend_from_slice(&self.body);
        output.write_all(&bytes)
    }
}

/// Reads one response. After status 101 the body is what has come of the other protocol already.
///
/// # Errors
/// [`HttpError`].
pub fn read_response(input: &mut impl Read) -> Result<Response, HttpError> {
    let ((status, framing), rest) = read_head(input, |head| {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut parsed = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(end) = parsed.parse(head).map_err(syntax)? else { return Ok(None) };
        Ok(Some(((parsed.code.unwrap_or_default(), Framing::of(parsed.headers)?), end)))
    })?;
    if status == 101 {
        return Ok(Response { status, body: rest, header: None });
    }
    let length = framing.length.ok_or(HttpError::NoLength)?;
    if length > RESPONSE_BODY_MAX as u64 {
        return Err(HttpError::BodyTooLong(length, RESPONSE_BODY_MAX));
    }
    Ok(Response { status, body: read_body(input, rest, length, RESPONSE_BODY_MAX)?, header: None })
}

/// RFC 9110, section 15.
fn reason(status: u16) -> &'static str {
    match status {
        101 => "Switching Protocols",
        200 => "OK",
        202 => "Accepted",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(bytes: &[u8]) -> Result<Request, HttpError> {
        read_request(&mut &*bytes)
    }

    fn refused(bytes: &[u8]) -> u16 {
        request(bytes).unwrap_err().answer().map_or(0, |error| error.status)
    }

    #[test]
    fn a_request_is_taken_apart() {
        let text = b"POST /v1/machine/stop?x=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nUpgrade: tea\r\n\r\nbodyrest";
        let parsed = request(text).unwrap();
        assert_eq!((parsed.method.as_str(), parsed.path.as_str()), ("POST", "/v1/machine/stop"));
        assert_eq!((parsed.body.as_slice(), parsed.upgrade.as_deref()), (&b"body"[..], Some("tea")));
        assert_eq!(request(b"GET / HTTP/1.0\n\n").unwrap().body, b"");
    }

    #[test]
    fn a_request_may_come_byte_by_byte() {
        struct Dripping<'a>(&'a [u8]);
        impl Read for Dripping<'_> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                let (first, rest) = self.0.split_at(self.0.len().min(1));
                self.0 = rest;
                buf[..first.len()].copy_from_slice(first);
                Ok(first.len())
            }
        }
        let text = b"PUT /x HTTP/1.1\r\ncontent-LENGTH: 3\r\n\r\nabc";
        assert_eq!(read_request(&mut Dripping(text)).unwrap().body, b"abc");
    }

    #[test]
    fn what_is_no_proper_request_has_a_status() {
        let many: String = (0..40).map(|i| format!("h{i}: x\r\n")).collect();
        let cases: [(&[u8], u16); 12] = [
            (b"", 0),
            (b"GET", 400),
            (b"GET / HTTP/2.0\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: +4\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
            (b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
            (many.as_bytes(), 400),
        ];
        for (bytes, status) in cases {
            assert_eq!(refused(bytes), status, "{}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(refused(format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()), 431);
        assert_eq!(refused(format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(2 * HEAD_MAX)).as_bytes()), 431);
    }

    #[test]
    fn a_response_is_read_as_it_is_written() {
        let response = Response::error(&ApiError::conflict("no"));
        let mut bytes = Vec::new();
        response.write(&mut bytes).unwrap();
        assert_eq!(read_response(&mut &*bytes).unwrap(), response);
        let endless = b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n";
        assert!(matches!(read_response(&mut &endless[..]), Err(HttpError::BodyTooLong(..))));
    }
}
