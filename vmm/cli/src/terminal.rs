//! The user's terminal: its size, and raw mode that is taken back on every way out.

use std::io::{IsTerminal, stdin, stdout};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The settings to go back to. Raw mode belongs to the process, and so does this.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Whether both ends are terminals.
pub(crate) fn is_interactive() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// Rows and columns of the terminal on stdout; zero where it does not know.
pub(crate) fn size() -> (u16, u16) {
    tcgetwinsize(stdout()).map_or((0, 0), |size| (size.ws_row, size.ws_col))
}

/// Hands every byte through unchanged until [`restore`].
pub(crate) fn set_raw() -> std::io::Result<()> {
    let before = tcgetattr(stdin())?;
    let mut raw = before.clone();
    raw.make_raw();
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    // What has been typed ahead stays.
    tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
    if saved.is_none() {
        *saved = Some(before);
    }
    Ok(())
}

/// Whether the terminal is in raw mode now.
pub(crate) fn is_raw() -> bool {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Goes back to the settings before [`set_raw`]; harmless if there is nothing to go back to.
pub(crate) fn restore() {
    if let Some(before) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &before);
    }
}
