//! The host's answers as errors of the seam.

use harrier_engine::EngineError;
use vmm_sys_util::errno;

/// Says what was being done when KVM refused.
pub(crate) fn refused(what: &'static str) -> impl Fn(errno::Error) -> EngineError {
    move |source| EngineError::Host { what, source: source.into() }
}
