package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/attest/ek"
	"sekisho/attest/eventlog"
	"sekisho/attest/quote"
	"sekisho/attest/tpm"
)

// Exit statuses of the commands that judge samples.
const (
	exitPass   = 0
	exitRefuse = 1
	exitNone   = 2 // no appraisal took place
)

const sampleUsage = `usage: attestctl eventlog LOG [LOG ...] [-pcrs PCRS.json] [-bank sha256|sha384|sha512|sha1] [-ak AK]
       attestctl ek CERT [-roots DIR|FILE]
       attestctl ek bundle -from DIR -out FILE [-date 2006-01-02]
       attestctl quote -ak AK -msg M -sig S [-nonce HEX] [-pcrs PCRS.json] [-log LOG]

with -json, or -lang ja|en (default: the locale's)

judge anyone's samples, without a device or a server

  eventlog  firmware event log, TCG 1.2 or crypto-agile; further logs are of the
            same boot. PCRS.json is {"sha256": {"0": "hex", ...}}. Without -bank,
            the best bank that log and values share. Without -pcrs the form is
            judged and nothing is proven. With -ak, a quote that Windows wrote
            into the log must be by that key and of the events before it.
  ek        endorsement key certificate, DER or PEM, as the TPM keeps it; by the
            makers' certificates built into this program, or those in -roots
  quote     AK is a public key as PEM, DER, TPMT_PUBLIC, TPM2B_PUBLIC or Windows
            key blob; M a TPMS_ATTEST, S a TPMT_SIGNATURE or plain

exit status: 0 pass, 1 refuse, 2 could not appraise

flags
`

// sampleOptions are the flags of the commands that judge samples.
type sampleOptions struct {
	json                                     bool
	pcrs, bank, roots, from, out, date       string
	ak, message, signature, nonce, eventlogs string
	language                                 string
	nonceGiven                               bool
	stderr                                   io.Writer
}

// samples runs the command if it is one that judges samples.
func samples(args []string, stdout, stderr io.Writer) (exit int, ok bool) {
	if len(args) == 0 || !slices.Contains([]string{"eventlog", "ek", "quote"}, args[0]) {
		return 0, false
	}
	o := sampleOptions{stderr: stderr}
	f := flag.NewFlagSet("attestctl "+args[0], flag.ContinueOnError)
	f.SetOutput(stderr)
	f.BoolVar(&o.json, "json", false, "print JSON, with both languages")
	f.StringVar(&o.language, "lang", "", "`language`: ja or en (default: the locale's)")
	f.StringVar(&o.pcrs, "pcrs", "", "PCR values, a JSON `file`")
	f.StringVar(&o.bank, "bank", "", "PCR bank to judge by")
	f.StringVar(&o.roots, "roots", "", "pinned certificates, PEM or DER: a `path` of a file or folder")
	f.StringVar(&o.from, "from", "", "`folder` with the certificates of TPM makers")
	f.StringVar(&o.out, "out", "", "`file` to write the bundle to")
	f.StringVar(&o.date, "date", "", "date of the bundle (default today)")
	f.StringVar(&o.ak, "ak", "", "attestation key, a `file`")
	f.StringVar(&o.message, "msg", "", "quote, a `file`")
	f.StringVar(&o.signature, "sig", "", "signature, a `file`")
	f.StringVar(&o.nonce, "nonce", "", "nonce in `hexadecimal`")
	f.StringVar(&o.eventlogs, "log", "", "event log, a `file`")
	f.Usage = func() {
		fmt.Fprint(f.Output(), sampleUsage)
		f.PrintDefaults()
	}
	words, err := parse(f, args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitPass, true
	case err != nil:
		return exitNone, true
	}
	f.Visit(func(x *flag.Flag) { o.nonceGiven = o.nonceGiven || x.Name == "nonce" })
	pass := false
	if o.language, err = language(o.language); err == nil {
		pass, err = o.run(args[0], words, stdout)
	}
	switch {
	case err != nil:
		fmt.Fprintln(stderr, "attestctl:", err)
		return exitNone, true
	case !pass:
		return exitRefuse, true
	}
	return exitPass, true
}

func (o *sampleOptions) run(command string, words []string, w io.Writer) (pass bool, err error) {
	switch {
	case command == "eventlog" && len(words) > 0:
		r, err := o.eventlog(words)
		if err != nil {
			return false, err
		}
		return r.Verdict == eventlog.VerdictPass, o.print(w, r, func(p printer) { p.log(r.Report); p.embedded(r.Quote) })
	case command == "ek" && len(words) == 1 && words[0] == "bundle":
		return true, o.bundle(w)
	case command == "ek" && len(words) == 1:
		r, err := o.ek(words[0])
		if err != nil {
			return false, err
		}
		return r.Accepted, o.print(w, r, func(p printer) { p.ek(r) })
	case command == "quote" && len(words) == 0:
		r, err := o.quote()
		if err != nil {
			return false, err
		}
		return r.Verdict == eventlog.VerdictPass, o.print(w, r, func(p printer) { p.quote(r) })
	}
	return false, errUsage
}

func (o *sampleOptions) print(w io.Writer, v any, human func(printer)) error {
	if o.json {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	p, flush := printer{harmless{w}, o.language}.table("", "")
	human(p)
	return flush()
}

// readCapped reads a file of at most limit bytes.
func readCapped(name string, limit int64) ([]byte, error) {
	data, err := readSample(name, limit)
	if err == nil && int64(len(data)) > limit {
		return nil, fmt.Errorf("%s: over %d bytes", name, limit)
	}
	return data, err
}

// readSample reads a sample, which limit bounds: of a larger one a byte more,
// for which whoever judges it refuses it.
func readSample(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit+1))
}

// logReport is the judgement of a log and, with -ak, of the quote in it.
type logReport struct {
	*eventlog.Report
	Quote *quote.Report `json:"quote,omitempty"`
}

func (o *sampleOptions) eventlog(names []string) (*logReport, error) {
	values, err := o.values()
	if err != nil {
		return nil, err
	}
	bank := eventlog.Bank(0)
	if o.bank != "" {
		if bank, err = eventlog.ParseBank(o.bank); err != nil {
			return nil, err
		}
		if values != nil && values[bank] == nil {
			return nil, fmt.Errorf("%s has no values of bank %s", o.pcrs, bank)
		}
	}
	l, err := readLogs(names)
	var refusal *attest.Refusal
	if errors.As(err, &refusal) {
		return &logReport{Report: eventlog.Unreadable(refusal)}, nil
	}
	if err != nil {
		return nil, err
	}
	if bank == 0 {
		if bank = l.BestBank(values); values != nil && values[bank] == nil {
			return nil, fmt.Errorf("%s has no values of a bank that the log has: %v", o.pcrs, l.Banks())
		}
	}
	r := &logReport{Report: l.Appraise(eventlog.Options{Bank: bank, PCRs: values[bank]})}
	if o.ak != "" {
		key, err := readCapped(o.ak, attest.MaxTPMBytes)
		if err != nil {
			return nil, err
		}
		signer, err := tpm.ParseSigner(key)
		if err != nil {
			return nil, err
		}
		if r.Quote = quote.JudgeEmbedded(l, signer); r.Quote.Verdict != eventlog.VerdictPass {
			r.Verdict, r.Proven = eventlog.VerdictRefuse, false
		}
	}
	return r, nil
}

// readLogs joins the logs of one boot.
func readLogs(names []string) (*eventlog.Log, error) {
	var all []*eventlog.Log
	for _, name := range names {
		data, err := readSample(name, attest.MaxEventLog)
		if err != nil {
			return nil, err
		}
		l, err := eventlog.Read(data)
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return all[0], all[0].Append(all[1:]...)
}

func (o *sampleOptions) values() (map[eventlog.Bank]map[int][]byte, error) {
	if o.pcrs == "" {
		return nil, nil
	}
	data, err := readCapped(o.pcrs, eventlog.MaxValues)
	if err != nil {
		return nil, err
	}
	return eventlog.ParseValues(data)
}

func (o *sampleOptions) ek(name string) (*ek.Report, error) {
	raw, err := readSample(name, ek.MaxText)
	if err != nil {
		return nil, err
	}
	cert, err := ek.Parse(raw)
	if err != nil {
		return &ek.Report{Verdict: "refuse", Chain: []ek.Link{}, Findings: []attest.Remark{attest.Refuse(attest.ReasonEKUntrusted, "%v", err).Remark()}}, nil
	}
	var roots *ek.Roots
	if o.roots == "" {
		roots, err = ek.BuiltIn()
	} else {
		roots, err = readRoots(o.roots, func(err error) { fmt.Fprintln(o.stderr, "attestctl: left out:", err) })
	}
	if err != nil {
		return nil, err
	}
	return ek.Judge(cert, roots, time.Now()), nil
}

// readRoots reads the certificates in a file, or in all files of a folder and
// the folders in it. A file of a folder that holds none, such as a TPM's own
// certificate with its header, is left out and reported to skipped, if given.
func readRoots(path string, skipped func(error)) (*ek.Roots, error) {
	roots := ek.NewRoots()
	err := filepath.WalkDir(path, func(name string, d os.DirEntry, err error) error {
		ext := filepath.Ext(name)
		if err != nil || d.IsDir() || name != path && !slices.Contains([]string{".pem", ".crt", ".cer", ".der"}, ext) {
			return err
		}
		data, err := readCapped(name, ek.MaxBundle)
		if err != nil {
			return err
		}
		if err := roots.Add(data); err != nil {
			if err = fmt.Errorf("%s: %w", name, err); skipped == nil || name == path {
				return err
			}
			skipped(err)
		}
		return nil
	})
	if err == nil && roots.Len() == 0 {
		err = fmt.Errorf("%s: no certificate in .pem, .crt, .cer or .der files", path)
	}
	return roots, err
}

func (o *sampleOptions) bundle(w io.Writer) error {
	if o.from == "" || o.out == "" {
		return errUsage
	}
	date := time.Now()
	if o.date != "" {
		var err error
		if date, err = time.Parse(time.DateOnly, o.date); err != nil {
			return err
		}
	}
	roots, err := readRoots(o.from, nil)
	if err != nil {
		return err
	}
	if err := os.WriteFile(o.out, ek.FormatBundle(roots, date), 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s: %d certificates of TPM makers\n", o.out, roots.Len())
	return err
}

func (o *sampleOptions) quote() (*quote.Report, error) {
	if o.ak == "" || o.message == "" || o.signature == "" {
		return nil, errUsage
	}
	var in quote.Input
	key, err := readCapped(o.ak, attest.MaxTPMBytes)
	if err != nil {
		return nil, err
	}
	if in.Key, err = tpm.ParseSigner(key); err != nil {
		return nil, err
	}
	if in.Message, err = readSample(o.message, attest.MaxTPMBytes); err != nil {
		return nil, err
	}
	if in.Signature, err = readSample(o.signature, attest.MaxTPMBytes); err != nil {
		return nil, err
	}
	if o.nonceGiven {
		if in.Nonce, err = hex.DecodeString(o.nonce); err != nil {
			return nil, fmt.Errorf("nonce: %w", err)
		}
	}
	if in.Values, err = o.values(); err != nil {
		return nil, err
	}
	if o.eventlogs == "" {
		return quote.Judge(in), nil
	}
	if in.Values == nil {
		return nil, errors.New("-log needs -pcrs: a log is judged by the values that the quote proves")
	}
	in.Log, err = readLogs([]string{o.eventlogs})
	var refusal *attest.Refusal
	if errors.As(err, &refusal) {
		r := quote.Judge(in)
		r.Verdict, r.Log = eventlog.VerdictRefuse, eventlog.Unreadable(refusal)
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	return quote.Judge(in), nil
}
