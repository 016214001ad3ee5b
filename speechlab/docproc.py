from nbdev.process import Processor
class LessonProc(Processor): pass
