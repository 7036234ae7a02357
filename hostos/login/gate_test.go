package login

import (
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/login/piv"
)

// Over all combinations: open needs every one of its conditions, and each that
// fails alone is the reason.
func TestDecide(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	states := []string{"", gate.StateNoTPM, gate.StateUnenrolled, gate.StateEnrolling, gate.StateAttesting, gate.StateAffirming, gate.StateRefused, gate.StateUnreachable}
	ends := []time.Time{{}, now.Add(-1), now, now.Add(time.Minute)}
	fingers := []time.Time{{}, now.Add(time.Second), now, now.Add(-30 * time.Second), now.Add(-31 * time.Second)}
	bools := []bool{false, true}
	n := 0
	for _, state := range states {
		for _, end := range ends {
			for _, finger := range fingers {
				for _, pinWanted := range bools {
					for _, fingerWanted := range bools {
						for _, pin := range bools {
							for _, left := range []int{0, 3} {
								for _, locked := range []time.Time{{}, now.Add(time.Second)} {
									for _, only := range []time.Time{{}, now, now.Add(time.Second)} {
										f := Facts{
											Policy:      attest.Logon{PIN: pinWanted, Finger: fingerWanted, FingerSeconds: 30},
											Attestation: gate.Status{State: state, NotAfter: end},
											PIN:         pin, PINLeft: left, Finger: finger, Locked: locked, PINOnly: only,
										}
										affirming := state == gate.StateAffirming && end.After(now)
										permit := only.After(now)
										pinOK := pin && left > 0 || !pinWanted && !permit && fingerWanted
										fingerOK := !fingerWanted || permit || locked.IsZero() && !finger.IsZero() && !finger.After(now) && now.Sub(finger) <= 30*time.Second
										got, want := Decide(f, now), affirming && pinOK && fingerOK
										if (got == Open) != want {
											t.Fatalf("%+v: %s, want open %v", f, got, want)
										}
										if ja, en := got.Words(); ja == "" || en == "" || (got.Status() == piv.OK) != want {
											t.Fatalf("%s: words %q %q, status %04X", got, ja, en, uint16(got.Status()))
										}
										n++
									}
								}
							}
						}
					}
				}
			}
		}
	}
	t.Logf("%d combinations", n)
	if Decide(Facts{}, now) == Open {
		t.Error("the zero value is open")
	}
	var none Reason
	if none.Status() != piv.SecurityStatus {
		t.Error("the zero reason answers something else than a refusal")
	}
}
