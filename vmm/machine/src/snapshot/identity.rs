//! Who a machine is: how it came to be, how many restores led to it, and which clone it is.

use harrier_hypercall_abi::calls::{ROLE_CLONE, ROLE_MIGRATED, ROLE_ORIGINAL, ROLE_RESTORED};

/// How a machine came to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// It was booted.
    #[default]
    Booted,
    /// It was made of a snapshot.
    Restored,
    /// It was forked: others like it may run beside it.
    Clone,
    /// It has moved here from another host.
    Migrated,
}

impl Role {
    /// Its number in [`harrier_hypercall_abi::calls::ROLES`].
    pub fn number(self) -> u32 {
        match self {
            Role::Booted => ROLE_ORIGINAL,
            Role::Restored => ROLE_RESTORED,
            Role::Clone => ROLE_CLONE,
            Role::Migrated => ROLE_MIGRATED,
        }
    }
}

/// Who a machine is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Identity {
    /// How it came to be.
    pub role: Role,
    /// The restores that led to it; zero in a machine that was booted.
    pub generation: u64,
    /// Tells the clones of one fork apart, from zero; zero in other machines.
    pub clone_index: u32,
}

/// What a snapshot is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restoration {
    /// How the machine comes to be: not [`Role::Booted`].
    pub role: Role,
    /// Tells the clones of one fork apart, from zero.
    pub clone_index: u32,
    /// The snapshot stays where it is, so that a difference to it may be taken.
    pub is_parent: bool,
}

impl Default for Restoration {
    /// A snapshot that is kept, and one machine made of it.
    fn default() -> Self {
        Restoration { role: Role::Restored, clone_index: 0, is_parent: true }
    }
}
