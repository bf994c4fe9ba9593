//! Numbers of jobs as people type them.

use harrier_jobs::queue::JobId;

use crate::exit::Failure;

/// Jobs that one command names.
const MAX_JOBS: usize = 200_000;

/// Digits of the largest number; a machine's id has more.
const MAX_DIGITS: usize = 9;

/// Whether a word names jobs and no machine: numbers, lists and ranges of them.
pub(crate) fn is_job(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_digit())
        && word.split([',', '-']).all(|part| {
            !part.is_empty() && part.len() <= MAX_DIGITS && part.bytes().all(|byte| byte.is_ascii_digit())
        })
}

/// Reads `ID`, `ID,ID` and `ID-ID`.
pub(super) fn parse(words: &[String]) -> Result<Vec<JobId>, Failure> {
    let mut ids = Vec::new();
    for part in words.iter().flat_map(|word| word.split(',')) {
        let number = |text: &str| text.trim().parse::<u32>().ok().filter(|id| *id > 0).map(JobId::from);
        let range = match part.split_once('-') {
            Some((first, last)) => number(first).zip(number(last)),
            None => number(part).map(|id| (id, id)),
        };
        let Some((first, last)) = range.filter(|(first, last)| first <= last) else {
            return Err(Failure::new(format!(
                "'{part}' is not a job: give a number like 7, or a range like 7-12"
            )));
        };
        for id in first..=last {
            if ids.len() >= MAX_JOBS {
                return Err(Failure::new(format!("'{part}' names too many jobs: {MAX_JOBS} at most")));
            }
            ids.push(id);
        }
    }
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    Ok(ids)
}

/// Writes numbers the shortest way.
pub(super) fn show(ids: &[JobId]) -> String {
    let mut parts: Vec<(JobId, JobId)> = Vec::new();
    for id in ids {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *id => *last = *id,
            _ => parts.push((*id, *id)),
        }
    }
    let words: Vec<String> = parts
        .iter()
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") })
        .collect();
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Result<Vec<JobId>, Failure> {
        parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn numbers_are_jobs_and_other_words_are_machines() {
        assert!(["7", "7-12", "1,3"].iter().all(|word| is_job(word)));
        assert!(!["", "-7", "7a", "quiet-owl", "123456789012", "1-", "1.5"].iter().any(|word| is_job(word)));
    }

    #[test]
    fn ranges_and_lists_are_read_and_written() {
        let ids = words(&["3", "5-7,3", "9"]).unwrap();
        assert_eq!(ids, [3, 5, 6, 7, 9]);
        assert_eq!(show(&ids), "3,5-7,9");
        for bad in ["", "x", "0", "7-5", "-3", "3-", "1-999999", "99999999999999999999"] {
            let err = words(&[bad]).unwrap_err();
            assert!(
                err.message.contains(&format!("'{bad}'")) || bad.starts_with('-') || bad.is_empty(),
                "{}",
                err.message
            );
        }
    }
}
