package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// Stages of a boot, in the order in which a report lists them; some run beside
// each other, so they need not end in this order.
const (
	StageFirmware = "firmware"       // power-on to the kernel
	StageKernel   = "kernel"         // to init
	StageInit     = "init"           // to the first service
	StageUplink   = "uplink"         // to an address
	StageAttested = "attested"       // to an affirming result
	StageTunnel   = "tunnel"         // to an inner address
	StageWork     = "work domain up" // to its link
	StagePage     = "page read"      // to the page, read in the work domain
)

// Stages lists them all.
var stageOrder = []string{StageFirmware, StageKernel, StageInit, StageUplink, StageAttested, StageTunnel, StageWork, StagePage}

// Stage is one finished stage.
type Stage struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"` // since power-on, by the lab's clock
}

// stamped is a line of out/run/console.log.
type stamped struct {
	at   time.Time
	text string
}

// parseStamped is the inverse of what StampConsole writes.
func parseStamped(line string) (stamped, error) {
	stamp, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	at, err := time.Parse(stampLayout, stamp)
	if err != nil {
		return stamped{}, fmt.Errorf("lab: console log: %w", err)
	}
	return stamped{at, text}, nil
}

// statusLine is a line of init (docs/host-domain.md, "Console").
type statusLine struct {
	since                  time.Duration // the kernel's start
	service, state, detail string
}

// parseStatusLine finds "sekisho [   12.345] SERVICE: STATE DETAIL" in a line
// of the console; other output may stand before it.
func parseStatusLine(text string) (statusLine, bool) {
	_, rest, ok := strings.Cut(text, "sekisho [")
	if !ok {
		return statusLine{}, false
	}
	clock, rest, ok := strings.Cut(rest, "] ")
	seconds, err := strconv.ParseFloat(strings.TrimSpace(clock), 64)
	if !ok || err != nil || !(seconds >= 0 && seconds < 1e9) {
		return statusLine{}, false
	}
	service, words, ok := strings.Cut(rest, ": ")
	if !ok || service == "" || strings.ContainsAny(service, " \t") {
		return statusLine{}, false
	}
	state, detail, _ := strings.Cut(strings.TrimSpace(words), " ")
	return statusLine{time.Duration(seconds * float64(time.Second)), service, strings.TrimRight(state, ",:"), strings.TrimSpace(detail)}, state != ""
}

// ends returns the stages that a line of the console is the end of. The kernel
// is quiet: when it began follows from the clock in init's first line.
func ends(text string) []string {
	s, ok := parseStatusLine(text)
	switch {
	case !ok:
		return nil
	case s.service == "init" && s.state == "started":
		return []string{StageFirmware, StageKernel}
	case s.service == "netd" && s.state == "Linked":
		return []string{StageInit, StageUplink}
	case s.service == "attestd" && s.state == "affirming":
		return []string{StageInit, StageAttested}
	case s.service == "netd" && s.state == "Attesting":
		return []string{StageInit, StageUplink}
	case s.service == "netd" && s.state == "Tunnel":
		return []string{StageInit, StageUplink, StageTunnel}
	case s.service == "linkd" && s.state == "linked":
		return []string{StageInit, StageWork}
	case s.service != "init":
		return []string{StageInit}
	}
	return nil
}

// errFirmware and errRefused end a boot that will not get any further.
var (
	errFirmware = errors.New("the firmware refused the image")
	errRefused  = errors.New("attestation refused")
)

// ErrLate is a boot that took longer than it may.
var ErrLate = errors.New("not done in time")

// Refused reports whether err is a boot that attestation refused, and
// FirmwareRefused one that the firmware did.
func Refused(err error) bool         { return errors.Is(err, errRefused) }
func FirmwareRefused(err error) bool { return errors.Is(err, errFirmware) }

// verdict returns why the line means that this boot will not get any further.
func verdict(text string) error {
	if s, ok := parseStatusLine(text); ok {
		if s.service == "attestd" && s.state == "refused" {
			return fmt.Errorf("%w: %s", errRefused, s.detail)
		}
		if s.service == "attestd" && s.state == "no-tpm" && s.detail != "starting" {
			return fmt.Errorf("%w: no TPM: %s", errRefused, s.detail)
		}
		return nil
	}
	// The boot manager of the UEFI Driver eXecution Environment says so.
	if strings.Contains(text, "BdsDxe: failed to") && (strings.Contains(text, "Access Denied") || strings.Contains(text, "Security Violation")) {
		return fmt.Errorf("%w: %s", errFirmware, strings.TrimSpace(text))
	}
	return nil
}

// follow calls each with the lines of the growing file, from the beginning,
// until it returns an error or done, or ctx ends.
func follow(ctx context.Context, path string, each func(stamped) (done bool, err error)) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	defer f.Close()
	r := bufio.NewReader(f)
	part := ""
	return waitFor(ctx, "the console", func() (bool, error) {
		for {
			more, err := r.ReadString('\n')
			part += more
			if errors.Is(err, io.EOF) {
				return false, nil
			}
			if err != nil {
				return false, err
			}
			line, err := parseStamped(part)
			part = ""
			if err != nil {
				return false, err
			}
			if done, err := each(line); done || err != nil {
				return done, err
			}
		}
	})
}
