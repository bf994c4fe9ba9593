//! The tables, and how older files become today's.

use rusqlite::{Connection, TransactionBehavior};

use super::{SqliteStore, sql_error};
use crate::store::{Result, StoreError};

/// 'Harr' in a file's header, beside the version.
const APPLICATION_ID: i64 = 0x4861_7272;

/// One script a version; never changed once released.
const MIGRATIONS: &[&str] = &["
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    user TEXT NOT NULL,
    spec TEXT NOT NULL,
    state TEXT NOT NULL,
    activity TEXT,
    reason TEXT NOT NULL,
    detail TEXT,
    priority INTEGER NOT NULL,
    submitted_ms INTEGER NOT NULL,
    not_before_ms INTEGER,
    epoch INTEGER NOT NULL DEFAULT 0,
    token TEXT,
    retries_used INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    array_first INTEGER,
    array_index INTEGER,
    open_dependencies INTEGER NOT NULL DEFAULT 0,
    host TEXT,
    claimed_ms INTEGER,
    lease_until_ms INTEGER,
    wanted INTEGER NOT NULL DEFAULT 0,
    started_ms INTEGER,
    ended_ms INTEGER,
    exit_code INTEGER,
    -- What matching needs of the specification.
    cpus INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    engine TEXT NOT NULL,
    cpu_model TEXT,
    requirements TEXT,
    rank TEXT
) STRICT;
CREATE INDEX jobs_ready ON jobs(priority DESC, user, id) WHERE state = 'queued' AND open_dependencies = 0;
CREATE INDEX jobs_oldest ON jobs(id) WHERE state = 'queued' AND open_dependencies = 0;
CREATE INDEX jobs_leased ON jobs(lease_until_ms) WHERE lease_until_ms IS NOT NULL;
CREATE INDEX jobs_open ON jobs(id) WHERE state NOT IN ('succeeded', 'failed', 'cancelled');
CREATE TABLE attempts (
    job INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    host TEXT NOT NULL,
    claimed_ms INTEGER NOT NULL,
    started_ms INTEGER,
    ended_ms INTEGER,
    reason TEXT,
    detail TEXT,
    exit_code INTEGER,
    engine TEXT,
    parent INTEGER,
    stdout_base INTEGER NOT NULL DEFAULT 0,
    stderr_base INTEGER NOT NULL DEFAULT 0,
    -- Work that the attempt began with, from its checkpoint.
    work_base_ms INTEGER NOT NULL DEFAULT 0,
    allocated_ms INTEGER NOT NULL DEFAULT 0,
    suspended_ms INTEGER NOT NULL DEFAULT 0,
    checkpoint_ms INTEGER NOT NULL DEFAULT 0,
    restore_ms INTEGER NOT NULL DEFAULT 0,
    transfer_ms INTEGER NOT NULL DEFAULT 0,
    committed_ms INTEGER NOT NULL DEFAULT 0,
    lost_ms INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, epoch)
) STRICT, WITHOUT ROWID;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT
) STRICT;
CREATE INDEX events_of_job ON events(job, seq);
CREATE TRIGGER events_are_kept BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
CREATE TABLE snapshots (
    job INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    number INTEGER NOT NULL,
    host TEXT,
    place TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    stdout_offset INTEGER NOT NULL,
    stderr_offset INTEGER NOT NULL,
    work_ms INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    usable INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (job, epoch, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE hosts (
    name TEXT PRIMARY KEY,
    ad TEXT NOT NULL,
    seen_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE dependencies (
    job INTEGER NOT NULL,
    needs INTEGER NOT NULL,
    kind TEXT NOT NULL,
    open INTEGER NOT NULL,
    PRIMARY KEY (job, needs, kind)
) STRICT, WITHOUT ROWID;
CREATE INDEX dependencies_on ON dependencies(needs) WHERE open = 1;
CREATE TABLE submissions (
    user TEXT NOT NULL,
    key TEXT NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    PRIMARY KEY (user, key)
) STRICT, WITHOUT ROWID;
CREATE TABLE usage (
    user TEXT PRIMARY KEY,
    cpu_ms REAL NOT NULL,
    at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO counters VALUES ('claims', 0);
", "
ALTER TABLE jobs ADD COLUMN progress TEXT;
ALTER TABLE jobs ADD COLUMN saved TEXT;
ALTER TABLE attempts ADD COLUMN files TEXT;
", "
ALTER TABLE snapshots ADD COLUMN cpu_model TEXT;
"];

fn number(connection: &Connection, pragma: &str) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, pragma, |row| row.get(0))
}

/// Brings the file to today's version.
pub(super) fn migrate(connection: &mut Connection, path: &str) -> Result<()> {
    let error = |err| sql_error(path, err);
    let newest = MIGRATIONS.len() as i64;
    let version = number(connection, "user_version").map_err(error)?;
    if version == newest {
        return Ok(());
    }
    // Another process may do the same: look again inside.
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(error)?;
    let version = number(&tx, "user_version").map_err(error)?;
    let tables: i64 =
        tx.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(error)?;
    let application = number(&tx, "application_id").map_err(error)?;
    if tables > 0 && application != APPLICATION_ID {
        return Err(StoreError::Damaged(path.to_owned(), "another program's database".to_owned()));
    }
    if version > newest {
        return Err(StoreError::Newer(path.to_owned(), version, newest));
    }
    for script in MIGRATIONS.iter().skip(usize::try_from(version).unwrap_or(0)) {
        tx.execute_batch(script).map_err(error)?;
    }
    tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(error)?;
    tx.pragma_update(None, "user_version", newest).map_err(error)?;
    tx.commit().map_err(error)
}

impl SqliteStore {
    /// The version of the tables that this program makes.
    pub const SCHEMA_VERSION: usize = MIGRATIONS.len();
}
