//! The PC's real-time clock and its battery-backed memory.
//!
//! A Motorola MC146818 (datasheet, section "Address map") behind an index port and a data port, with the century
//! where the PC keeps it. It shows UTC. The guest may set it; then it runs on with the difference to the host's
//! clock. Alarms and periodic interrupts are stored and never raised: the device has no interrupt line.

use std::time::{SystemTime, UNIX_EPOCH};

use harrier_engine::Flow;

use crate::bus::BusDevice;
use crate::state::{BadState, Stateful};

/// First port: the index; the next one is the data.
pub const PORT: u16 = 0x70;
/// Ports that the device takes.
pub const SIZE: u64 = 2;
/// Index of the century byte, for the FADT.
pub const CENTURY_INDEX: u8 = 0x32;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

/// 32.768 kHz time base, no periodic interrupt.
const A_DEFAULT: u8 = 0x26;
const A_UPDATE_IN_PROGRESS: u8 = 0x80;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const D_VALID: u8 = 0x80;
const HOUR_PM: u8 = 0x80;

/// Where the clock takes the time from: seconds since the Unix epoch.
pub type TimeSource = Box<dyn Fn() -> i64 + Send>;

/// A calendar date and time of day, as the guest may set it: the fields need not make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Calendar {
    /// Full year.
    year: i64,
    /// 1 to 12.
    month: i64,
    /// 1 to 31.
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

/// Days from 1 March of year 0 to 1 January 1970 in the proleptic Gregorian calendar.
const EPOCH_DAYS: i64 = 719_468;
const DAYS_PER_ERA: i64 = 146_097;

impl Calendar {
    /// The date of a number of seconds since the epoch. Years start in March here, so that the leap day is
    /// the last day of a year.
    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400) + EPOCH_DAYS;
        let time = seconds.rem_euclid(86_400);
        let day_of_era = days.rem_euclid(DAYS_PER_ERA);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Calendar {
            year: days.div_euclid(DAYS_PER_ERA) * 400 + year_of_era + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * march_month + 2) / 5 + 1,
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    /// Seconds since the epoch. Fields out of their range carry over.
    fn to_unix(self) -> i64 {
        let months = self.year * 12 + self.month - 1 - 2;
        let (year, march_month) = (months.div_euclid(12), months.rem_euclid(12));
        let year_of_era = year.rem_euclid(400);
        let day_of_era =
            year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + (153 * march_month + 2) / 5 + self.day
                - 1;
        let days = year.div_euclid(400) * DAYS_PER_ERA + day_of_era - EPOCH_DAYS;
        ((days * 24 + self.hour) * 60 + self.minute) * 60 + self.second
    }

    /// 1 is Sunday.
    fn weekday(self) -> i64 {
        // 1 January 1970 was a Thursday.
        (self.to_unix().div_euclid(86_400) + 4).rem_euclid(7) + 1
    }
}

/// The clock.
pub struct Rtc {
    now: TimeSource,
    /// Guest time minus host time, in seconds.
    offset: i64,
    /// The time while the guest holds the clock with the SET bit.
    held: Option<Calendar>,
    index: u8,
    status_a: u8,
    status_b: u8,
    memory: [u8; 128],
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtc {
    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::with_time_source(Box::new(|| match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX),
        }))
    }

    /// A clock that takes the time from `now`.
    pub fn with_time_source(now: TimeSource) -> Self {
        Rtc {
            now,
            offset: 0,
            held: None,
            index: 0,
            status_a: A_DEFAULT,
            status_b: B_24_HOURS,
            memory: [0; 128],
        }
    }

    fn host_seconds(&self) -> i64 {
        // Far beyond what a century byte can show, and safe to calculate with.
        (self.now)().clamp(-1 << 40, 1 << 40)
    }

    fn calendar(&self) -> Calendar {
        self.held.unwrap_or_else(|| Calendar::from_unix(self.host_seconds() + self.offset))
    }

    fn encode(&self, value: i64) -> u8 {
        let value = u8::try_from(value.rem_euclid(100)).unwrap_or(0);
        if self.status_b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> i64 {
        if self.status_b & B_BINARY != 0 {
            i64::from(value)
        } else {
            i64::from(value >> 4) * 10 + i64::from(value & 0xf)
        }
    }

    fn read_time(&self, index: u8) -> Option<u8> {
        let time = self.calendar();
        Some(match index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS if self.status_b & B_24_HOURS != 0 => self.encode(time.hour),
            HOURS => {
                let pm = if time.hour >= 12 { HOUR_PM } else { 0 };
                self.encode((time.hour + 11).rem_euclid(12) + 1) | pm
            }
            WEEKDAY => self.encode(time.weekday()),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode(time.year),
            CENTURY_INDEX => self.encode(time.year.div_euclid(100)),
            _ => return None,
        })
    }

    /// Answers whether `index` belongs to the time.
    fn write_time(&mut self, index: u8, value: u8) -> bool {
        let mut time = self.calendar();
        let number = self.decode(value);
        match index {
            SECONDS => time.second = number,
            MINUTES => time.minute = number,
            HOURS if self.status_b & B_24_HOURS != 0 => time.hour = number,
            HOURS => {
                let half = if value & HOUR_PM != 0 { 12 } else { 0 };
                time.hour = self.decode(value & !HOUR_PM) % 12 + half;
            }
            // Follows from the date.
            WEEKDAY => {}
            DAY => time.day = number,
            MONTH => time.month = number,
            YEAR => time.year = time.year.div_euclid(100) * 100 + number,
            CENTURY_INDEX => time.year = number * 100 + time.year.rem_euclid(100),
            _ => return false,
        }
        if self.held.is_some() {
            self.held = Some(time);
        } else {
            self.offset = time.to_unix() - self.host_seconds();
        }
        true
    }

    fn read_register(&self) -> u8 {
        match self.index {
            STATUS_A => self.status_a,
            STATUS_B => self.status_b,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index => {
                self.read_time(index).or_else(|| self.memory.get(usize::from(index)).copied()).unwrap_or(0xff)
            }
        }
    }

    fn write_register(&mut self, value: u8) {
        match self.index {
            STATUS_A => self.status_a = value & !A_UPDATE_IN_PROGRESS,
            STATUS_B => {
                self.status_b = value;
                match (value & B_SET != 0, self.held) {
                    (true, None) => self.held = Some(self.calendar()),
                    (false, Some(time)) => {
                        self.held = None;
                        self.offset = time.to_unix() - self.host_seconds();
                    }
                    _ => {}
                }
            }
            STATUS_C | STATUS_D => {}
            index => {
                if !self.write_time(index, value)
                    && let Some(byte) = self.memory.get_mut(usize::from(index))
                {
                    *byte = value;
                }
            }
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow {
        data.fill(0xff);
        if offset == 1
            && let Some(first) = data.first_mut()
        {
            *first = self.read_register();
        }
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        match (offset, data) {
            // Bit 7 masks the NMI on a PC; there is none to mask. A 16-bit write hits both ports.
            (0, [index, rest @ ..]) => {
                self.index = index & 0x7f;
                if let Some(&value) = rest.first() {
                    self.write_register(value);
                }
            }
            (1, [value, ..]) => self.write_register(*value),
            _ => {}
        }
        Flow::Continue
    }
}

/// What a snapshot keeps of the clock.
pub mod state {
    use serde::{Deserialize, Serialize};

    /// The time itself is the host's; only the difference is the guest's.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct RtcState {
        /// Guest time minus host time, in seconds.
        pub offset_s: i64,
        /// The time that the guest holds with the SET bit: year, month, day, hour, minute, second.
        pub held: Option<[i64; 6]>,
        /// The index port.
        pub index: u8,
        /// Status register A.
        pub status_a: u8,
        /// Status register B.
        pub status_b: u8,
        /// The battery-backed memory, 128 bytes.
        pub memory: Vec<u8>,
    }
}

impl Stateful for Rtc {
    type State = state::RtcState;
    const NAME: &'static str = "rtc";

    fn save(&self) -> Self::State {
        state::RtcState {
            offset_s: self.offset,
            held: self.held.map(|at| [at.year, at.month, at.day, at.hour, at.minute, at.second]),
            index: self.index,
            status_a: self.status_a,
            status_b: self.status_b,
            memory: self.memory.to_vec(),
        }
    }

    fn restore(&mut self, state: Self::State) -> Result<(), BadState> {
        // Far beyond what the registers can say, and safe to calculate with.
        let sane = |value: i64| (-1 << 41..=1 << 41).contains(&value);
        BadState::unless(sane(state.offset_s), || format!("no clock is {} s off", state.offset_s))?;
        if let Some(held) = state.held {
            let sane = held.iter().all(|field| (0..1 << 20).contains(field));
            BadState::unless(sane, || format!("{held:?} is no time"))?;
        }
        let memory = state.memory.try_into();
        self.memory =
            memory.map_err(|bytes: Vec<u8>| BadState(format!("{} bytes of memory", bytes.len())))?;
        self.offset = state.offset_s;
        self.held = state.held.map(|[year, month, day, hour, minute, second]| Calendar {
            year,
            month,
            day,
            hour,
            minute,
            second,
        });
        self.index = state.index & 0x7f;
        self.status_a = state.status_a & !A_UPDATE_IN_PROGRESS;
        self.status_b = state.status_b;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    fn clock(at: i64) -> (Rtc, Arc<AtomicI64>) {
        let now = Arc::new(AtomicI64::new(at));
        let source = now.clone();
        (Rtc::with_time_source(Box::new(move || source.load(Ordering::Relaxed))), now)
    }

    fn get(rtc: &mut Rtc, index: u8) -> u8 {
        let _ = rtc.write(0, &[index | 0x80]);
        let mut data = [0];
        let _ = rtc.read(1, &mut data);
        data[0]
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8) {
        let _ = rtc.write(0, &[index]);
        let _ = rtc.write(1, &[value]);
    }

    fn date(rtc: &mut Rtc) -> [u8; 7] {
        [CENTURY_INDEX, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|index| get(rtc, index))
    }

    #[test]
    fn dates_are_right_over_leap_years_and_centuries() {
        for (unix, bcd, weekday) in [
            (0, [0x19, 0x70, 1, 1, 0, 0, 0], 5),
            (951_782_399, [0x20, 0x00, 2, 0x28, 0x23, 0x59, 0x59], 2),
            (951_782_400, [0x20, 0x00, 2, 0x29, 0, 0, 0], 3),
            (1_795_415_445, [0x20, 0x26, 0x11, 0x23, 0x06, 0x30, 0x45], 2),
            (4_107_542_400, [0x21, 0x00, 3, 1, 0, 0, 0], 2),
            (-1, [0x19, 0x69, 0x12, 0x31, 0x23, 0x59, 0x59], 4),
        ] {
            let (mut rtc, _) = clock(unix);
            assert_eq!(date(&mut rtc), bcd, "{unix}");
            assert_eq!(get(&mut rtc, WEEKDAY), weekday, "{unix}");
        }
    }

    #[test]
    fn every_day_of_four_centuries_converts_back() {
        let mut expected = (1970, 1, 1);
        for day in 0..DAYS_PER_ERA {
            let date = Calendar::from_unix(day * 86_400);
            assert_eq!((date.year, date.month, date.day), expected);
            assert_eq!(date.to_unix(), day * 86_400);
            let (year, month, day) = expected;
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let last = match month {
                2 if leap => 29,
                2 => 28,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            expected = match (month, day == last) {
                (12, true) => (year + 1, 1, 1),
                (_, true) => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
        }
    }

    #[test]
    fn binary_and_twelve_hour_modes_show_the_same_time() {
        let (mut rtc, now) = clock(13 * 3600 + 45 * 60);
        assert_eq!(get(&mut rtc, HOURS), 0x13);
        set(&mut rtc, STATUS_B, 0);
        assert_eq!(get(&mut rtc, HOURS), 0x81);
        set(&mut rtc, STATUS_B, B_BINARY | B_24_HOURS);
        assert_eq!((get(&mut rtc, HOURS), get(&mut rtc, MINUTES)), (13, 45));
        set(&mut rtc, STATUS_B, 0);
        for (hour, shown) in [(0, 0x12), (11, 0x11), (12, 0x92), (23, 0x91)] {
            now.store(hour * 3600, Ordering::Relaxed);
            assert_eq!(get(&mut rtc, HOURS), shown);
        }
    }

    #[test]
    fn a_clock_that_the_guest_sets_goes_on_from_there() {
        let (mut rtc, now) = clock(1_700_000_000);
        set(&mut rtc, STATUS_B, B_SET | B_24_HOURS);
        for (index, value) in [
            (SECONDS, 0x58),
            (MINUTES, 0x59),
            (HOURS, 0x23),
            (DAY, 0x31),
            (MONTH, 0x12),
            (YEAR, 0x99),
            (CENTURY_INDEX, 0x20),
        ] {
            set(&mut rtc, index, value);
        }
        now.fetch_add(100, Ordering::Relaxed);
        assert_eq!(date(&mut rtc), [0x20, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]);
        set(&mut rtc, STATUS_B, B_24_HOURS);
        now.fetch_add(2, Ordering::Relaxed);
        assert_eq!(date(&mut rtc), [0x21, 0, 1, 1, 0, 0, 0]);
    }

    #[test]
    fn memory_keeps_what_is_written_and_status_says_valid() {
        let (mut rtc, _) = clock(0);
        set(&mut rtc, 0x40, 0x5a);
        assert_eq!(get(&mut rtc, 0x40), 0x5a);
        assert_eq!(get(&mut rtc, STATUS_D), D_VALID);
        assert_eq!(get(&mut rtc, STATUS_A) & A_UPDATE_IN_PROGRESS, 0);
        let _ = rtc.write(0, &[0x41, 0xa5]);
        assert_eq!(get(&mut rtc, 0x41), 0xa5);
    }

    #[test]
    fn nonsense_in_any_register_and_width_is_survived() {
        let (mut rtc, now) = clock(0);
        let mut x = 7u64;
        for _ in 0..100_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            set(&mut rtc, (x >> 56) as u8 & if x & 1 == 0 { 0x0f } else { 0xff }, (x >> 48) as u8);
            let mut data = [0; 4];
            let _ = rtc.read(x >> 20 & 3, &mut data[..1 << (x >> 30 & 1)]);
            if x >> 40 & 0xff == 0 {
                now.store(if x & 2 == 0 { i64::MAX } else { i64::MIN }, Ordering::Relaxed);
            }
            let _ = get(&mut rtc, YEAR);
        }
        assert_eq!(get(&mut rtc, STATUS_D), D_VALID);
    }
}
