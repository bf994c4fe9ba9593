//! The suite's list of entries, `x86/unittests.cfg`.

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Entry {
    pub(super) name: String,
    /// File name in `x86/`.
    pub(super) file: String,
    pub(super) cpus: u32,
    /// Words for the program's command line.
    pub(super) arguments: String,
    /// Options of QEMU.
    pub(super) qemu: Vec<String>,
    /// `i386` or `x86_64` where it is only for one of them.
    pub(super) arch: String,
    pub(super) timeout_s: u64,
    pub(super) groups: Vec<String>,
    /// Files of the host and the text that they must have.
    pub(super) checks: Vec<(String, String)>,
    /// The accelerator of QEMU that it is only for.
    pub(super) accel: String,
}

/// What the suite gives an entry that says nothing.
const TIMEOUT_S: u64 = 90;

/// Reads the list. What is not known is not looked at.
pub(super) fn parse(text: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let name = name.to_owned();
            entries.push(Entry { name, cpus: 1, timeout_s: TIMEOUT_S, ..Entry::default() });
            continue;
        }
        let (Some(entry), Some((key, value))) = (entries.last_mut(), line.split_once('=')) else { continue };
        let (key, value) = (key.trim(), unquoted(value.trim()));
        match key {
            "file" => entry.file = value.to_owned(),
            "smp" => entry.cpus = value.parse().unwrap_or(1),
            "test_args" => entry.arguments = value.to_owned(),
            "qemu_params" | "extra_params" => entry.qemu = words(value),
            "arch" => entry.arch = value.to_owned(),
            "timeout" => entry.timeout_s = value.trim_end_matches('s').parse().unwrap_or(TIMEOUT_S),
            "groups" => entry.groups = words(value),
            "check" => {
                entry.checks = words(value)
                    .iter()
                    .filter_map(|word| word.split_once('='))
                    .map(|(file, text)| (file.to_owned(), text.to_owned()))
                    .collect();
            }
            "accel" => entry.accel = value.to_owned(),
            _ => {}
        }
    }
    entries
}

fn unquoted(value: &str) -> &str {
    for quote in ['"', '\''] {
        if let Some(inner) = value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)) {
            return inner;
        }
    }
    value
}

fn words(value: &str) -> Vec<String> {
    value.split_whitespace().map(str::to_owned).collect()
}

impl Entry {
    /// The word after an option of QEMU.
    pub(super) fn option(&self, name: &str) -> Option<&str> {
        let at = self.qemu.iter().position(|word| word == name)?;
        self.qemu.get(at + 1).map(String::as_str)
    }

    /// The processor that it asks QEMU for: a name, then features with a sign.
    pub(super) fn cpu(&self) -> &str {
        self.option("-cpu").unwrap_or("qemu64")
    }

    /// Memory in MiB; QEMU's 128 unless it says more.
    pub(super) fn memory_mib(&self) -> u64 {
        let text = self.option("-m").unwrap_or("128");
        match text.strip_suffix(['g', 'G']) {
            Some(gib) => gib.parse::<u64>().map_or(128, |gib| gib * 1024),
            None => text.parse().unwrap_or(128),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_the_suite_means_them() {
        let entries = parse(
            "# a comment\n[one]\nfile = a.flat\nsmp = 2\nqemu_params = -cpu max,+x -m 4g\n\
             test_args = 'x y'\ntimeout = 30\ngroups = a b\n\n#[off]\n[two]\nfile = b.flat\n\
             check = /p/q=Y /r=0\naccel = kvm\ntest_args=\"1 `date +%s`\"\narch = i386\n",
        );
        assert_eq!(entries.len(), 2);
        let [one, two] = &entries[..] else { unreachable!() };
        assert_eq!((one.name.as_str(), one.file.as_str(), one.cpus, one.timeout_s), ("one", "a.flat", 2, 30));
        assert_eq!((one.cpu(), one.memory_mib(), one.arguments.as_str()), ("max,+x", 4096, "x y"));
        assert_eq!((two.cpu(), two.memory_mib(), two.timeout_s), ("qemu64", 128, 90));
        assert_eq!(two.checks, [("/p/q".to_owned(), "Y".to_owned()), ("/r".to_owned(), "0".to_owned())]);
        assert_eq!((two.arguments.as_str(), two.arch.as_str()), ("1 `date +%s`", "i386"));
    }
}
