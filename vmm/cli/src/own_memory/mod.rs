//! The monitor's own memory, and what of it goes back to the host while the guest needs little.

mod heap;
mod program_pages;

pub(crate) use heap::share_between_threads;

/// Gives back what is free or can be had again.
pub(crate) fn give_back() {
    heap::give_back();
    program_pages::give_back();
}

#[cfg(test)]
mod tests {
    /// A line of /proc/self/status (proc_pid_status(5)) in KiB.
    pub(super) fn resident_kib(line: &str) -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|text| text.strip_prefix(line)).unwrap();
        size.trim().trim_end_matches(" kB").parse().unwrap()
    }
}
