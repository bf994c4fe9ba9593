//! `harrier coordinator`.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use harrier_coordinator::{Listen, Options, Tls, serve};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::flags::CoordinatorFlags;
use super::place;
use crate::exit::Failure;

pub(super) fn run(flags: &CoordinatorFlags) -> Result<u8, Failure> {
    let options = Options {
        listen: listen(&flags.listen)?,
        tls: flags
            .tls_cert
            .clone()
            .zip(flags.tls_key.clone())
            .map(|(certificate, key)| Tls { certificate, key }),
        token: flags.token_file.as_deref().map(place::read_token).transpose()?,
    };
    if matches!(options.listen, Listen::Unix(_)) && options.tls.is_some() {
        return Err(Failure::new("--tls-cert is for addresses, and a unix socket needs none: leave it out"));
    }
    let store = place::open_to_serve(flags.folder.as_deref(), place::lease(&flags.lease)?)?;
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let (stop, stopped) = mpsc::channel::<()>();
    let second = Arc::new(AtomicBool::new(false));
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for _ in signals.forever() {
            if second.swap(true, Ordering::Relaxed) {
                // What was answered is in the store; the rest was never promised.
                std::process::exit(0);
            }
            // A server that has ended by itself needs no telling.
            let _ = stop.send(());
        }
    })?;
    let ready = |url: &str| {
        // Scripts read the address here; nobody may be listening.
        let _ = super::print(&format!("{url}\n"));
    };
    let wait_for_stop = move || {
        // Without the sender nobody can ask any more.
        let _: Result<(), _> = stopped.recv();
    };
    serve(store, options, ready, wait_for_stop)?;
    Ok(0)
}

fn listen(text: &str) -> Result<Listen, Failure> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(Listen::Unix(std::path::absolute(Path::new(path))?));
    }
    text.parse().map(Listen::Tcp).map_err(|_| {
        Failure::new(format!(
            "--listen '{text}' is no address: write ADDRESS:PORT with numbers like 127.0.0.1:7707, or unix:PATH"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_listens_on_addresses_and_sockets() {
        assert_eq!(listen("[::1]:80").unwrap(), Listen::Tcp("[::1]:80".parse().unwrap()));
        assert_eq!(listen("unix:/run/q").unwrap(), Listen::Unix("/run/q".into()));
        assert!(listen("pool").unwrap_err().message.contains("'pool'"));
    }
}
