//go:build linux

package daemon

import (
	"maps"
	"slices"
	"time"

	"sekisho/netd"
	"sekisho/netd/uplink"
)

const (
	maxSamples = 240             // of one radio: a few hours where little changes
	sampleStep = 3               // dB that are worth a sample at once
	sampleTime = 1 * time.Minute // before a smaller change is worth one
)

// signals is the history of each radio's signal, by the link's name.
type signals map[string][]netd.SignalSample

// note takes over how well the radios among the uplinks hear their networks,
// and forgets those that are gone. A radio's history begins when it is joined
// first.
func (s signals) note(list []uplink.Candidate, now time.Time) {
	maps.DeleteFunc(s, func(name string, _ []netd.SignalSample) bool {
		return !slices.ContainsFunc(list, func(c uplink.Candidate) bool { return c.Name == name })
	})
	for _, c := range list {
		old := s[c.Name]
		if c.Kind != netd.KindWifi || len(old) == 0 && c.Signal == 0 {
			continue
		}
		if n := len(old); n > 0 {
			last := old[n-1]
			step := max(last.DBM-c.Signal, c.Signal-last.DBM)
			if step == 0 || step < sampleStep && now.Sub(last.At) < sampleTime {
				continue
			}
		}
		old = append(old, netd.SignalSample{At: now, DBM: c.Signal})
		s[c.Name] = old[max(0, len(old)-maxSamples):]
	}
}

// clone is for a reader who takes his time.
func (s signals) clone() map[string][]netd.SignalSample {
	out := make(map[string][]netd.SignalSample, len(s))
	for name, list := range s {
		out[name] = slices.Clone(list)
	}
	return out
}
