//go:build linux

package wpa

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

const (
	maxSSID     = 32   // bytes, IEEE 802.11-2020 section 9.4.2.2
	maxNetworks = 1024 // lines of scan results that are looked at
)

// Event is one line that wpa_supplicant says by itself: "<3>CTRL-EVENT-... ".
type Event struct {
	Name string            // the first word, such as CTRL-EVENT-CONNECTED
	Text string            // the rest
	Args map[string]string // the words of the rest that have the form key=value
}

// ParseEvent reads an event; ok is false for anything else, as for an answer.
func ParseEvent(line string) (e Event, ok bool) {
	if len(line) < 4 || len(line) > maxMessage || line[0] != '<' || line[1] < '0' || line[1] > '9' || line[2] != '>' {
		return Event{}, false
	}
	name, text, _ := strings.Cut(strings.TrimSpace(line[3:]), " ")
	if name == "" {
		return Event{}, false
	}
	e = Event{Name: name, Text: text, Args: map[string]string{}}
	for _, w := range strings.Fields(text) {
		if k, v, found := strings.Cut(w, "="); found {
			e.Args[k] = strings.Trim(v, `"`)
		}
	}
	return e, true
}

// ParseStatus reads "key=value" lines, as STATUS and SIGNAL_POLL answer.
func ParseStatus(text string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(text[:min(len(text), maxMessage)]) {
		if k, v, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			m[k] = v
		}
	}
	return m
}

// Seen is a Wi-Fi network in reach.
type Seen struct {
	SSID     []byte
	BSSID    string
	Signal   int // dBm
	Security Security
}

// ParseScan reads SCAN_RESULTS: a head line, then lines of BSSID, frequency,
// signal, flags and SSID, separated by tabs. Lines that make no sense are left
// out, as are networks without a name and those that want what we do not speak.
func ParseScan(text string) []Seen {
	var list []Seen
	for line := range strings.Lines(text[:min(len(text), maxMessage)]) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 5)
		if len(f) != 5 || len(list) == maxNetworks {
			continue
		}
		signal, err := strconv.Atoi(f[2])
		if err != nil || signal < -200 || signal > 100 {
			continue
		}
		ssid, err := unescape(f[4])
		if err != nil || len(ssid) == 0 || len(ssid) > maxSSID || len(bytes.Trim(ssid, "\x00")) == 0 {
			continue
		}
		security, ok := securityOf(f[3])
		if !ok {
			continue
		}
		list = append(list, Seen{SSID: ssid, BSSID: f[0], Signal: signal, Security: security})
	}
	return list
}

// securityOf reads the flags of a scan result, "[WPA2-PSK+SAE-CCMP][ESS]".
// WPA (TKIP) and WEP alone are not spoken: they protect nothing.
func securityOf(flags string) (Security, bool) {
	switch {
	case !strings.Contains(flags, "[ESS]"):
		return "", false
	case strings.Contains(flags, "[WPA2-"), strings.Contains(flags, "[RSN-"):
		switch {
		case strings.Contains(flags, "PSK"), strings.Contains(flags, "SAE"):
			return Personal, true
		case strings.Contains(flags, "EAP"):
			return Enterprise, true
		case strings.Contains(flags, "OWE"):
			return Open, true
		}
		return "", false
	case strings.Contains(flags, "WPA"), strings.Contains(flags, "WEP"):
		return "", false
	}
	return Open, true
}

// unescape undoes wpa_supplicant's printf_encode: \xNN, \n, \r, \t, \e, \", \\.
func unescape(s string) ([]byte, error) {
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			out = append(out, s[i])
			continue
		}
		if i++; i == len(s) {
			return nil, fmt.Errorf("ssid %.64q ends in a backslash", s)
		}
		switch s[i] {
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'e':
			out = append(out, 0x1b)
		case '"', '\\':
			out = append(out, s[i])
		case 'x':
			if i+2 >= len(s) {
				return nil, fmt.Errorf("ssid %.64q ends in a number", s)
			}
			n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
			if err != nil {
				return nil, fmt.Errorf("ssid %.64q: %w", s, err)
			}
			out = append(out, byte(n))
			i += 2
		default:
			return nil, fmt.Errorf("ssid %.64q: unknown escape \\%c", s, s[i])
		}
	}
	return out, nil
}
